# Sourced by the launch scripts: what the TPU compiler is told, by generation, each flag with its reason.
# The set is small on purpose: the 25 flags that are often passed together make a compilation five times as long.
# A flag that libtpu does not know ends the program at its start, so a test asks libtpu for each. To compile with them:
#   LIBTPU_INIT_ARGS="$(source launch/xla_flags.sh; xla_flags v5p 1)" python -m wallwm_jax.preflight ...

xla_flags() { # generation, slices
  local flags=()
  case $1 in
  v5p | v6e | tpu7x)
    flags+=(
      # SparseCores move weights (the second flag: of groups that span two sides of the torus, as those of our meshes
      # do), their gradients and sums while the rest of the chip computes; without these the chip waits for all of
      # them. libtpu 0.0.42 (jax 0.10.2) takes the flags and still waits for the weights.
      --xla_tpu_enable_sparse_core_collective_offload_all_gather=true
      --xla_tpu_enable_sparse_core_collective_offload_2d_all_gather=true
      --xla_tpu_enable_sparse_core_collective_offload_reduce_scatter=true
      --xla_tpu_enable_sparse_core_collective_offload_all_reduce=true
      # What a context axis exchanges around an attention moves beside the next projection. Not on v5e: "Async all-to-all
      # not supported on limited ICI" ends the compilation of a step.
      --xla_tpu_enable_async_all_to_all=true
    )
    ;;
  v5e) ;; # it has no SparseCores, and runs products inside gathers by itself
  esac
  if [ "$2" -gt 1 ]; then
    flags+=(
      # Host memory for messages between slices is pinned once, 16 GiB at the start, not message by message.
      --megascale_grpc_premap_memory_bytes=17179869184
    )
  fi
  echo "${flags[*]}"
}
