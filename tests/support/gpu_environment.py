"""Variables of every process that uses DeepEP or several GPUs of one host."""

ONE_HOST = {
    "NVSHMEM_REMOTE_TRANSPORT": "none",
    # NVLink multicast stays off: it needs rights that a container may lack.
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}
# torch may bring another copy of NCCL than the package that deep_ep was built with.
DEEPEP = ONE_HOST | {"EP_SUPPRESS_NCCL_CHECK": "1"}
