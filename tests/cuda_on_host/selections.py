"""Which of the operators' own tests (tests/ops) are run on the CUDA kernels, as expressions of pytest's ``-k``."""

# Tests of tests/ops that ask about the CPU alone, or are too large for fibers.
LEFT_OUT = "not (threads or compiled or instruction or most_steps or many_patterns or opcheck or without_dense)"
SELECTIONS = {
    "bottleneck_attend": "not (many_rows_may or too_large_for_the_caches or layout and (float16 or float32))",
    "bottleneck_select": (
        "(adversarial and float32) or first_are_kept or padding or masked or nan_comes or panel"
        " or may_be_huge or wrong_arguments or (rounds_both and not float32) or one_group or expanded or no_gradient"
    ),
    "hopfield_retrieve": (
        "(match_the_reference and (float64 or bfloat16)) or gradcheck_through or every_output or tol or opposite"
        " or infinite_logits or wrong_arguments or checks_what or expanded or huge_inverse"
    ),
}

# On a GPU these end all further use of the device: an assertion there stops the kernel. tests/gpu has them apart.
STOPS_THE_DEVICE = "not (bad_lists or checks_what)"
