# Sourced by the launch scripts: what the TPU compiler is told, by generation, each flag with its reason.
# The set is small on purpose: the 25 flags that are often passed together make a compilation five times as long.
# A flag that libtpu does not know ends the program at its start, so a test asks libtpu for each. To compile with them:
#   LIBTPU_INIT_ARGS="$(source launch/xla_flags.sh; xla_flags v5p 1)" python -m wallwm_jax.preflight ...

xla_flags() { # generation, slices
  local flags=(
    # Weights are gathered beside other work: by default the compiler waits for every gather. It takes both flags, one
    # to make gathers asynchronous, one to let products run inside them.
    --xla_enable_async_all_gather=true
    --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
  )
  if [ "$1" = v6e ]; then
    flags+=(
      # One kernel may use 96 of the chip's 128 MiB of VMEM: larger tiles, fewer passes over HBM.
      --xla_tpu_scoped_vmem_limit_kib=98304
    )
  fi
  if [ "$2" -gt 1 ]; then
    flags+=(
      # Between slices, gradients of one layer are reduced while the next is computed; layers differ in size.
      --xla_tpu_enable_data_parallel_all_reduce_opt=true
      --xla_tpu_data_parallel_opt_different_sized_ops=true
      # Host memory for messages between slices is pinned once, at the start.
      --megascale_grpc_premap_memory_bytes=17179869184
    )
  fi
  echo "${flags[*]}"
}
