# Runs a grid and writes its results, for the comparisons: source it and call run_rows. It reads root (of the clone), here
# (the folder of results.py), work, results (the folder of the README.md), smoke ('--smoke' or nothing), and from the
# environment JOBS, ROWS, UPDATES and RESULTS.

# one GPU at most: fairseq would share out a row over all there are, with as many times the batch
CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0}
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES%%,*}

# run_rows GRID: the exit status is that of the runs
run_rows() {
    local grid=$1 failed=0
    say "Training and evaluating (logs: $work/runs)"
    cd "$root"  # the grid names the plugin as seen from here
    # shellcheck disable=SC2086 # ROWS and smoke are words
    _grid() { python "$root/examples/compare/grid_in.py" "$grid" "$work" $smoke ${UPDATES:+--updates "$UPDATES"} "$@"; }
    _grid > "$work/grid.yaml"
    _grid --rows ${ROWS:-} > "$work/now.yaml"
    python -m fairseq_fastweights.compare run "$work/now.yaml" --jobs "${JOBS:-1}" || failed=$?
    if [ -z "$smoke${UPDATES:-}" ] || [ -n "${RESULTS:-}" ]; then
        say "Results"
        python "$here/results.py" "$work" --into "$results"
    fi
    return "$failed"
}
