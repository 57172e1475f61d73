# Sourced by the launch scripts: what the TPU compiler is told, by generation, each flag with its reason.
# The set is small on purpose: the 25 flags that are often passed together make a compilation five times as long.
# A flag that libtpu does not know ends the program at its start, so a test asks libtpu for each. To compile with them:
#   LIBTPU_INIT_ARGS="$(source launch/xla_flags.sh; xla_flags v5p 1)" python -m wallwm_jax.preflight ...

xla_flags() { # generation, slices
  local flags=()
  case $1 in
  v5p | v6e)
    flags+=(
      # Weights are gathered beside other work: here the compiler waits for every gather unless told otherwise. It takes
      # both flags, one to make gathers asynchronous, one to let products run inside them. libtpu 0.0.42 (jax 0.10.2)
      # takes them; 0.0.50 (jax 0.12) refuses the second but on v5e: errors, it says, may follow, silent ones, too.
      --xla_enable_async_all_gather=true
      --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
    )
    ;;
  v5e | tpu7x) ;; # v5e does so by itself; on tpu7x the two change nothing
  esac
  if [ "$2" -gt 1 ]; then
    flags+=(
      # Host memory for messages between slices is pinned once, 16 GiB at the start, not message by message.
      --megascale_grpc_premap_memory_bytes=17179869184
    )
  fi
  echo "${flags[*]}"
}
