"""PTX that turns one word of packed weights into its eight bf16, by `Format.code` and zero points.

Of `WEIGHTS`, $0 to $7 are the weights: inputs 2t and 2t + 1 of channel g, the same of g + 8, then
2t + 8 and 2t + 9 of both. $8 is the word, $9 and $10 the scales of g and g + 8, $11 and $12 their
zero points, where they have some: each twice, in both halves. `SCALES` makes those of a word as it
is stored, once for all words that share them. Of "codes", $0 to $3 are two weights each, 128 + code
without a scale, and $4 is the word.
"""

_REGISTERS = ".reg .b32 c0, c1, c2, c3, t, z0, z1, base;"
# 0x4300 is 128 in bf16, and its last bits count ones: or-ing a code gives 128 + code.
_INTEGERS = """
    mov.b32 base, 0x43004300;
    lop3.b32 c0, $8, 0x000f000f, base, 0xea;
    shr.u32 t, $8, 4;
    lop3.b32 c1, t, 0x000f000f, base, 0xea;
    shr.u32 t, $8, 8;
    lop3.b32 c2, t, 0x000f000f, base, 0xea;
    shr.u32 t, $8, 12;
    lop3.b32 c3, t, 0x000f000f, base, 0xea;
"""
_LESS_ZERO = """
    sub.bf16x2 c0, c0, z0;
    sub.bf16x2 c1, c1, z1;
    sub.bf16x2 c2, c2, z0;
    sub.bf16x2 c3, c3, z1;
"""
# Sign, exponent and mantissa where bf16 has them, in the lowest bits of its exponent: 2**126 too
# small, and 0.5 a subnormal. The scale's exponent makes up for it.
_E2M1 = """
    and.b32 c0, $8, 0x81c081c0;
    shl.b32 t, $8, 5;
    and.b32 c1, t, 0x80008000;
    shl.b32 t, $8, 3;
    lop3.b32 c1, t, 0x01c001c0, c1, 0xea;
    shl.b32 t, $8, 6;
    and.b32 c2, t, 0x81c081c0;
    shl.b32 t, $8, 4;
    and.b32 c3, t, 0x80008000;
    shr.u32 t, $8, 6;
    lop3.b32 c3, t, 0x01c001c0, c3, 0xea;
"""
_SCALE = """
    mul.bf16x2 c0, c0, $9;
    mul.bf16x2 c1, c1, $10;
    mul.bf16x2 c2, c2, $9;
    mul.bf16x2 c3, c3, $10;
"""
_RESULT = """
    mov.b32 {$0, $1}, c0;
    mov.b32 {$2, $3}, c1;
    mov.b32 {$4, $5}, c2;
    mov.b32 {$6, $7}, c3;
"""
_WORDS = "mov.b32 $0, c0; mov.b32 $1, c1; mov.b32 $2, c2; mov.b32 $3, c3;"
_MIDDLE = "mov.b32 z0, 0x43084308; mov.b32 z1, 0x43084308;"
_ZERO = "mov.b32 z0, $11; mov.b32 z1, $12;"

WEIGHTS = {
    "middle": "{" + _REGISTERS + _MIDDLE + _INTEGERS + _LESS_ZERO + _SCALE + _RESULT + "}",
    "zero": "{" + _REGISTERS + _ZERO + _INTEGERS + _LESS_ZERO + _SCALE + _RESULT + "}",
    "e2m1": "{" + _REGISTERS + _E2M1 + _SCALE + _RESULT + "}",
    "codes": "{" + _REGISTERS + _INTEGERS.replace("$8", "$4") + _WORDS + "}",
}
_WEIGHTS_TAKE = "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r"
WEIGHTS_TAKE = {
    "codes": "=r,=r,=r,=r,r",
    "middle": _WEIGHTS_TAKE,
    "zero": _WEIGHTS_TAKE + ",r,r",
    "e2m1": _WEIGHTS_TAKE,
}

# Two bf16; and four exponents, of both channels for 32 inputs, then for the next 32.
SCALES = {
    "bf16": "prmt.b32 $0, $2, $2, 0x1010; prmt.b32 $1, $2, $2, 0x3232;",
    "e2m1": """{
        .reg .b32 g, h;
        prmt.b32 g, $4, 0, 0x4240;
        prmt.b32 h, $4, 0, 0x4341;
        mad.lo.s32 g, g, 128, 0x3f003f00;
        mad.lo.s32 h, h, 128, 0x3f003f00;
        prmt.b32 $0, g, g, 0x1010;
        prmt.b32 $1, h, h, 0x1010;
        prmt.b32 $2, g, g, 0x3232;
        prmt.b32 $3, h, h, 0x3232;
    }""",
}
SCALES_TAKE = {"bf16": "=r,=r,r", "e2m1": "=r,=r,=r,=r,r"}
