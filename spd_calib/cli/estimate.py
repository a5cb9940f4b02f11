"""What profile --dry-run says."""


def print_estimate(lm, texts, method, strategies, kinds, target_stderr, batch_size, tasks) -> dict[str, float]:
    """Says what would be run, and returns it."""
    from dataclasses import asdict

    from spd_calib.sensitivity.estimate import estimate, estimate_fisher, one_after_another
    from spd_calib.sensitivity.profile import drops, experiments_of

    from .terminal import say

    if method == "fisher":
        found = [estimate_fisher(lm, t.calibration, kinds, target_stderr, batch_size) for t in texts]
        each, samples = [e for e, _ in found], min(samples for _, samples in found)
        what = f"one pass forward and backward with {samples} samples a sequence, more where the error asks for it"
    else:
        plan = list(drops(method, strategies, lm.num_blocks, kinds))
        each = [estimate(lm, t.calibration, experiments_of(plan, lm.num_blocks), batch_size) for t in texts]
        what = f"{len(plan)} experiments and the dense model"
    e = one_after_another(each)
    say(
        f"would be run: {what}, on {e.batches} batches, {e.tokens} tokens; as much as {e.forwards:.1f} forwards of them"
    )
    hours, seconds = divmod(round(e.seconds), 3600)
    say(f"time: about {hours} h {seconds // 60} min {seconds % 60} s (timed on the first sequences)")
    say(f"memory: about {e.peak / 2**20:,.0f} MiB at most, of which weights {e.weights / 2**20:,.0f} MiB")
    if tasks:
        say(f"not counted: the lm-eval tasks, once for the dense model and once for each of {len(plan)} experiments")
    say("nothing was written")
    return asdict(e)
