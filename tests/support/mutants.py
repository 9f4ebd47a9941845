"""Mutants: the library with one line broken, and the checks of `popart_func.verify` that must notice.

**To add a mutant**, add an entry to `MUTANTS`: the function, a part of its source, what replaces the part, and the
names of all checks that must fail then. `mutation` finds the part in the function's syntax tree. A change that is more
than a broken line, such as a broken engine, is in `surroundings`.
"""

from __future__ import annotations

from mutation import Mutant

from popart_func import _art_step, _module_calls, models, moments, optim, pop_art, target_statistics
from popart_func.learners import algorithms, batches
from popart_func.optim import transformations
from popart_func.random import basic, choices, keys

SPLIT = {"split_sgd", "split_momentum", "split_adam"}


HEADS = {"pop_preserves_outputs", "fold_is_invariant"}


BOUND = {"bound_holds", "bound_is_reached"}


MOMENTS = {"moments_momentum", "moments_adam"}


EQUIVALENCE = {"proposition_3", "proposition_3_momentum"}


POPPED = {"algorithm_1", "algorithm_1_gradient", *EQUIVALENCE, *MOMENTS}


NORMALIZED = {"algorithm_1", "algorithm_1_gradient", "art_alone", "art_gradient"}


# The checks of training whose statistics come from batches of targets.
TRAINED = {*NORMALIZED, "algorithm_2"}


FUNCTIONAL = {"grad_is_backward", "vjp_is_grad_tensors", "jacobian_rows"}


CORRECTED = {"bound_holds", "weighted_moments", "batches", "joined_ranks", "sequential_batch"}


SCALED = {"weighted_moments", "batches", "joined_ranks", "sequential_batch", "sample_moments"}


RUNNING = {*SCALED, "offsets"}
"""Checks that notice the same mutants."""


MUTANTS = {
    "a module keeps its own head bias": Mutant(
        _module_calls.call_module,
        "held[key] = given[name]",
        "held[key] = 0 * given[name] if name == 'output_linear.bias' else given[name]",
        {*SPLIT, "grad_is_backward", "vjp_is_grad_tensors", *POPPED, *TRAINED, "sgd_alone"},
    ),
    "a module transposes what enters tanh": Mutant(
        _module_calls.call_module,
        "held[key] = given[name]",
        "held[key] = given[name].flip(-1) if 'hidden0.w' in name else given[name]",
        {*SPLIT, *FUNCTIONAL, *POPPED, *TRAINED, "sgd_alone"} - EQUIVALENCE,  # both of its sides are transposed
    ),
    "the halves are put together without the trained head": Mutant(
        models.unify,
        "return {**lower, **upper}",
        "return {**lower, **{name: 0 * value for name, value in upper.items()}}",
        SPLIT,
    ),
    "momentum is dampened": Mutant(
        optim.trace,
        "return grad + as_dtype(decay, grad) * moment",
        "return (1 - as_dtype(decay, grad)) * grad + as_dtype(decay, grad) * moment",
        {"split_momentum", "moments_momentum", "optimizers"},
    ),
    "the step goes uphill": Mutant(
        optim.scale_by_learning_rate,
        "-as_dtype(rate, grad) * grad",
        "as_dtype(rate, grad) * grad",
        {*SPLIT, "optimizers", "sgd_alone", "algorithm_1", "art_alone", "algorithm_2"},
    ),
    "Adam counts from one": Mutant(
        optim.scale_by_adam,
        "count = state.count + 1",
        "count = state.count + 2",
        {"split_adam", "optimizers", "moments_adam"},
    ),
    "Adam's ε is inside the root": Mutant(
        optim.scale_by_adam,
        "mean / (size + as_dtype(eps, second))",
        "mean / (size.square() + as_dtype(eps, second)).sqrt()",
        {"split_adam", "optimizers"},
    ),
    "the sign of POP's shift": Mutant(
        pop_art._popped,
        "(old.shift - new.shift) + (old.residue - new.residue)",
        "(new.shift - old.shift) + (new.residue - old.residue)",
        {*HEADS, *POPPED},
    ),
    "POP divides by the old scale": Mutant(
        pop_art._popped, "difference / new.scale", "difference / old.scale", {*HEADS, "pop_composes", *POPPED}
    ),
    "POP's ratio upside down": Mutant(
        pop_art._popped, "old.scale / new.scale", "new.scale / old.scale", {*HEADS, "pop_composes", *POPPED}
    ),
    "POP takes the scale that no bound has clamped": Mutant(
        pop_art._popped,
        "ratio = old.scale / new.scale",
        "ratio = old.variance.sqrt() / new.variance.sqrt()",
        {*HEADS, "pop_composes"},
    ),
    "POP forgets the residues": Mutant(
        pop_art._popped, "(old.shift - new.shift) + (old.residue - new.residue)", "old.shift - new.shift", HEADS
    ),
    "POP to the same statistics rounds": Mutant(
        pop_art._popped,
        "ratio * params[bias] + difference / new.scale",
        "(old.scale * params[bias] + difference) / new.scale",
        {"pop_composes"},
    ),
    "the folded head forgets the residue": Mutant(
        pop_art.fold,
        "(params[bias] * state.scale + state.residue)",
        "params[bias] * state.scale",
        {"fold_is_invariant"},
    ),
    "unnormalize forgets the residue": Mutant(
        target_statistics.unnormalize, "(values * scale + residue)", "values * scale", {"normalize_inverts"}
    ),
    "unnormalize takes the scale that no bound has clamped": Mutant(
        target_statistics._broadcast_statistics,
        "statistics = state.shift, state.scale, state.residue",
        "statistics = state.shift, state.variance.sqrt(), state.residue",
        {"normalize_inverts", "bound_holds"},
    ),
    "normalize forgets the residue": Mutant(
        target_statistics.normalize,
        "((values - shift) - residue)",
        "(values - shift)",
        {"normalize_inverts", *BOUND, "info"},
    ),
    "β_t is that of the next update": Mutant(
        _art_step.moved,
        "of.number(count, batch.mean)",
        "of.number(count + 1, batch.mean)",
        CORRECTED,
    ),
    "β_t counts the updates of all tasks": Mutant(
        _art_step.moved,
        "of.number(count, batch.mean)",
        "of.number(count if isinstance(count, int) else count.sum().expand(count.shape), batch.mean)",
        CORRECTED,
    ),
    "β_t cancels": Mutant(
        _art_step.corrected,
        "-of.expm1(count * of.log1p(-step))",
        "1 - (1 - step) ** count",
        CORRECTED - {"joined_ranks"},  # whose update is the first
    ),
    "the variance is ν − μ²": Mutant(
        _art_step.moved,
        "of.lerp(variance, square, step)",
        "of.lerp(variance + before[0] ** 2, batch.spread + (high + before[0]) ** 2, step)"
        " - (before[0] + step * high) ** 2",
        {*BOUND, *RUNNING, "info"},
    ),
    "the variance lacks (1 − β)": Mutant(
        _art_step.moved,
        "batch.spread + (1 - step) * of.at_most(distance * distance, limits.max)",
        "batch.spread + of.at_most(distance * distance, limits.max)",
        {"bound_is_reached", *RUNNING, *TRAINED},
    ),
    "a batch's variance is left out": Mutant(
        _art_step.moved,
        "batch.spread + (1 - step) * of.at_most(distance * distance, limits.max)",
        "(1 - step) * of.at_most(distance * distance, limits.max)",
        {*BOUND, "batches", "joined_ranks", *TRAINED},
    ),
    "the mean's rounding is lost": Mutant(
        moments.two_sum,
        "return total, (a - (total - b_part)) + (b - b_part)",
        "return total, torch.zeros_like(total)",
        {*BOUND, *RUNNING},
    ),
    "the scale is the variance": Mutant(
        _art_step.moved, "of.sqrt(of.at_least(variance, 0))", "of.at_least(variance, 0)", {*BOUND, *RUNNING, *TRAINED}
    ),
    "no bound keeps the scale down": Mutant(
        _art_step.moved,
        "of.at_most(of.at_least(deviation, scale_lb), scale_ub)",
        "of.at_least(deviation, scale_lb)",
        SCALED,
    ),
    "no bound keeps the scale up": Mutant(
        _art_step.moved,
        "of.at_most(of.at_least(deviation, scale_lb), scale_ub)",
        "of.at_most(deviation, scale_ub)",
        SCALED,
    ),
    "a sequential batch forgets to correct its steps": Mutant(
        _art_step.moved,
        "if options.bias_correction:\n step = corrected(of, of.number(step, batch.mean), of.number(count, batch.mean))",
        'if options.bias_correction and options.reduction != "sequential":\n'
        " step = corrected(of, of.number(step, batch.mean), of.number(count, batch.mean))",
        {"sequential_batch"},
    ),
    "a sum's corrected step does not count its targets": Mutant(
        _art_step.moved,
        "of.number(step, batch.mean)",
        "of.number(options.step_size, batch.mean)",
        {"batches"},
    ),
    "an absent task moves": Mutant(
        target_statistics._moved,
        "torch.where(present, after, before)",
        "after",
        {*CORRECTED, "popart_update", "algorithm_1", "art_alone", "algorithm_2"},
    ),
    "a sum counts as a mean": Mutant(
        _art_step.moved,
        'options.reduction == "sum"',
        "False",
        {"batches", "joined_ranks"},
    ),
    "a sequential batch runs backwards": Mutant(
        target_statistics.art_with,
        "range(targets.shape[0])",
        "reversed(range(targets.shape[0]))",
        {"sequential_batch"},
    ),
    "gradients flow into the statistics": Mutant(
        target_statistics.art_with, "targets.detach().to(dtype)", "targets.to(dtype)", {"no_statistics_gradient"}
    ),
    "gradients flow through the residue": Mutant(
        target_statistics.art_with,
        "PopArtState(*(field.detach().to(dtype) for field in state))._replace(count=state.count.detach())",
        "PopArtState(*(field.detach().to(dtype) for field in state))._replace("
        "count=state.count.detach(), residue=state.residue.to(dtype))",
        {"no_statistics_gradient"},
    ),
    "the popped head is dropped": Mutant(
        algorithms.popart_learner,
        "LearnerState(params, statistics, opt_state)",
        "LearnerState(state.params, statistics, opt_state)",
        POPPED,
    ),
    "the statistics move after the forward pass": Mutant(
        algorithms.popart_learner,
        "_descend(network, optimizer, loss, popped, example, moved)",
        "(lambda pair: (pair[0]._replace(statistics=statistics), pair[1]))"
        "(_descend(network, optimizer, loss, popped._replace(statistics=state.statistics), example, moved))",
        {*POPPED, "info"},
    ),
    "ART's statistics move after the forward pass": Mutant(
        algorithms.art_learner,
        "_descend(network, optimizer, loss, state._replace(statistics=statistics), example, moved)",
        "(lambda pair: (pair[0]._replace(statistics=statistics), pair[1]))"
        "(_descend(network, optimizer, loss, state, example, moved))",
        {"art_alone", "art_gradient", "info"},
    ),
    "Algorithm 2 takes the old scales": Mutant(
        algorithms.normalized_sgd_learner,
        "example.rescale(statistics, example.rescale(statistics, delta))",
        "example.rescale(state.statistics, example.rescale(state.statistics, delta))",
        {"algorithm_2", *EQUIVALENCE},
    ),
    "Σ⁻² acts on the sum, not on each output": Mutant(
        algorithms.normalized_sgd_learner,
        "scaled_delta = example.rescale(statistics, example.rescale(statistics, delta))",
        "scaled_delta = delta / statistics.scale.square().mean()",
        {"algorithm_2", *EQUIVALENCE},
    ),
    "Σ⁻² scales the head's gradient too": Mutant(
        algorithms.normalized_sgd_learner,
        "pull_back(example.lift(delta, outputs))",
        "pull_back(example.lift(scaled_delta, outputs))",
        {"algorithm_2", *EQUIVALENCE},
    ),
    "the loss is not averaged over the batch": Mutant(
        algorithms._half_square,
        "0.5 * delta.square().sum() / outputs.shape[:-1].numel()",
        "0.5 * delta.square().sum()",
        {*NORMALIZED, *EQUIVALENCE, *MOMENTS, "sgd_alone", "info"},
    ),
    "the head's moments stay": Mutant(
        pop_art.PopArt.update_network,
        "optim.rescale_moments(opt_state, factors, others, network=networks[0])",
        "opt_state",
        {*MOMENTS, "proposition_3_momentum"},
    ),
    "the moments' ratio upside down": Mutant(
        pop_art._gradient_factors,
        "layer.at_outputs(old).scale / layer.at_outputs(new).scale",
        "layer.at_outputs(new).scale / layer.at_outputs(old).scale",
        {*MOMENTS, "proposition_3_momentum"},
    ),
    "the second moment takes the ratio once": Mutant(
        optim.rescale_moments, "scaled(tree, of_leaves, int(power))", "scaled(tree, of_leaves, 1)", {"moments_adam"}
    ),
    "moments below the head take the ratio once": Mutant(
        optim.gradient_factors, "ratio.squeeze(-1).square()", "ratio.squeeze(-1)", MOMENTS
    ),
    "the scale is clamped before the root": Mutant(
        _art_step.moved,
        "of.at_most(of.at_least(deviation, scale_lb), scale_ub)",
        "of.sqrt(of.at_most(of.at_least(of.at_least(variance, 0), scale_lb), scale_ub))",
        {*BOUND, *SCALED, *TRAINED},
    ),
    "a bound leaves its trace in the variance": Mutant(
        _art_step.moved,
        "return shift, scale, variance, count, residue",
        "return shift, scale, scale * scale, count, residue",
        SCALED,
    ),
    "an ε in the variance": Mutant(
        _art_step.moved,
        "of.sqrt(of.at_least(variance, 0))",
        "of.sqrt(of.at_least(variance, 0) + 1e-8)",
        {*SCALED, "bound_is_reached"},
    ),
    "β_t counts targets, not updates": Mutant(
        _art_step.moved,
        "count + (count < MOST_UPDATES)",
        "count + (int(batch.samples) if isinstance(count, int) else batch.samples.int())",
        {"bound_holds", "batches", "joined_ranks"},
    ),
    "the residue is subtracted": Mutant(
        _art_step.moved,
        "step * low + residue",
        "step * low - residue",
        RUNNING - {"joined_ranks"},  # which starts without a residue
    ),
    "a batch's variance is the unbiased one": Mutant(
        moments._pooled,
        "(shares * squares).sum(0)",
        "(shares * squares).sum(0) * some.sum(0) / (some.sum(0) - 1).clamp(min=1)",
        {"bound_is_reached", "batches", "joined_ranks", *TRAINED},
    ),
    "a batch's mean is over all tasks' targets": Mutant(
        moments.moments,
        "belongs / samples.clamp(min=1)",
        "belongs / targets.shape[0]",
        {"bound_holds", "batches", "joined_ranks", *TRAINED},
    ),
    "an ε in normalize": Mutant(
        target_statistics.normalize,
        "((values - shift) - residue) / scale",
        "((values - shift) - residue) / (scale + 1e-8)",
        {"normalize_inverts", "bound_is_reached", "info", *MOMENTS, *EQUIVALENCE},
    ),
    "popart forgets the upper bound": Mutant(
        pop_art.popart,
        'ArtOptions("popart", step_size, scale_lb, scale_ub, reduction, bias_correction, gather)',
        'ArtOptions("popart", step_size, scale_lb, 1e6, reduction, bias_correction, gather)',
        {"popart_update", *TRAINED},
    ),
    "popart forgets the bias correction": Mutant(
        pop_art.popart,
        'ArtOptions("popart", step_size, scale_lb, scale_ub, reduction, bias_correction, gather)',
        'ArtOptions("popart", step_size, scale_lb, scale_ub, reduction, False, gather)',
        {"popart_update"},
    ),
    "Adam's decays change places": Mutant(
        optim.adam,
        "scale_by_adam(b1, b2, eps)",
        "scale_by_adam(b2, b1, eps)",
        {"split_adam", "optimizers", "moments_adam"},
    ),
    "Adam's 1 − bᵗ cancels": Mutant(
        transformations.one_minus_power,
        "return -torch.expm1(count.to(dtype) * rate.to(dtype).log())",
        "return 1 - rate.to(dtype) ** count.to(dtype)",
        {"optimizers"},
    ),
    "Adam's 1 − bᵗ of a plain number counts from one": Mutant(
        transformations.one_minus_power,
        "count.to(dtype) * (math.log(rate) if rate > 0 else -math.inf)",
        "(count + 1).to(dtype) * math.log(rate)",
        {"optimizers"},
    ),
    "Nesterov looks back": Mutant(
        optim.trace,
        "accumulate(grad, moment) if nesterov else moment",
        "moment",
        {"optimizers"},
    ),
    "a schedule counts from one": Mutant(
        optim.scale_by_learning_rate,
        "rate_at(learning_rate, state.count)",
        "rate_at(learning_rate, state.count + 1)",
        {"optimizers"},
    ),
    "rescaled, Adam counts anew": Mutant(
        optim.rescale_moments,
        "kind.write(part, new)",
        'kind.write(part, {**new, "count": 0 * part.count} if hasattr(part, "nu") else new)',
        {"moments_adam"},
    ),
    "moments below the head follow unasked": Mutant(
        pop_art.PopArt.update_network,
        "factors, others = _gradient_factors(layers[0], state, new), None",
        "factors, others = _gradient_factors(layers[0], state, new), ("
        "(state.scale / new.scale).squeeze(-1).square() if tasks == 1 else None)",
        {*MOMENTS, "proposition_3_momentum"},
    ),
    "SGD has an offset": Mutant(
        algorithms.sgd_learner,
        'unpack("sgd_learner", batch, state.statistics, None)',
        'unpack("sgd_learner", (batch[0], 1 + batch[1], *batch[2:]), state.statistics, None)',
        {"sgd_alone", "info"},
    ),
    "Algorithm 2 sums over its batch": Mutant(
        batches.Example.average, "losses / outputs.shape[:-1].numel()", "losses", {"algorithm_2", *EQUIVALENCE}
    ),
    "a difference loses the shift as well": Mutant(
        batches.Example.rescale,
        "statistics._replace(shift=zero, residue=zero)",
        "statistics",
        {"algorithm_2", *EQUIVALENCE, "info"},
    ),
    "the error is reported in normalized units": Mutant(
        algorithms._descend,
        "example.rescale(statistics, delta, inverse=True)",
        "example.rescale(statistics, delta)",
        {"info"},
    ),
    "the error is reported with the shift's rounding": Mutant(
        algorithms._descend,
        "example.rescale(statistics, delta, inverse=True).abs()",
        "(unnormalize(statistics, normalized_prediction, example.tasks) - example.y).abs()",
        {"info"},
    ),
    "ranks' means are joined without their weights": Mutant(
        moments.join,
        "batches.samples / _divisor(samples)",
        "batches.samples.clamp(max=1) / batches.samples.clamp(max=1).sum(0).clamp(min=1)",
        {"joined_ranks"},
    ),
    "ranks' variances are joined without that of their means": Mutant(
        moments._pooled,
        "spreads + (deviations - correction).square()",
        "torch.where(spreads > 0, spreads, (deviations - correction).square())",
        {"joined_ranks"},
    ),
    "ranks' targets lie behind zeros": Mutant(
        target_statistics._gathered_rows,
        "torch.cat([rows, rows.new_zeros(_, *rows.shape[1:])])",
        "torch.cat([rows.new_zeros(max(sizes) - rows.shape[0], *rows.shape[1:]), rows])",
        {"joined_ranks"},
    ),
    "Threefry injects its keys without the counter": Mutant(
        keys.threefry,
        "second + words[(group + 2) % 3] + (group + 1)",
        "second + words[(group + 2) % 3]",
        {"random_bits"},
    ),
    "keys are split by pairs of counters": Mutant(
        keys.counters, "torch.zeros_like(low), low", "low, torch.zeros_like(low)", {"random_bits"}
    ),
    "fold_in takes the data for the upper word": Mutant(
        keys.fold_in,
        "threefry(key, torch.zeros_like(low), low)",
        "threefry(key, low, torch.zeros_like(low))",
        {"random_bits"},
    ),
    "integers leave their range": Mutant(
        basic._modulo_small, "torch.where(_below(rest, span), rest, rest - span)", "rest", {"random_bits"}
    ),
    "integers forget the upper words": Mutant(
        basic.randint, "_modulo(bits(first, shape), span) * power", "0 * power", {"random_bits"}
    ),
    "a uniform number takes a bit too many": Mutant(
        basic.to_unit, "keys.shift_right(words, 9)", "(keys.shift_right(words, 8) / 2)", {"random_numbers"}
    ),
    "an empty interval has numbers below it": Mutant(
        basic.uniform,
        "torch.maximum(multiply_add(units, high_end - low_end, low_end), low_end)",
        "multiply_add(units, high_end - low_end, low_end)",
        {"random_numbers"},
    ),
    "normal numbers are centred on another one": Mutant(
        basic._quantile, "_between(unit, -_BELOW_ONE, 1.0)", "_between(unit, -1.0, 1.0)", {"random_numbers"}
    ),
    "coins count the limit in": Mutant(
        basic.bernoulli, "uniform(key, shape) < limit", "uniform(key, shape) <= 1 - limit", {"random_numbers"}
    ),
    "Gumbel numbers are made from 0 on": Mutant(
        choices._negative_gumbel,
        "uniform(key, shape, minval=_TINY, maxval=1.0)",
        "uniform(key, shape)",
        {"random_numbers"},
    ),
    "permutations sort signed words": Mutant(
        choices._shuffle, "bits(now, x.shape) ^ _LEAST", "bits(now, x.shape)", {"random_bits"}
    ),
    "momentum keeps what Nesterov sees ahead": Mutant(
        optim.trace,
        "MomentumState(moments)",
        "MomentumState(updates)",
        {"optimizers"},
    ),
    "Algorithm 2 reports with the old statistics": Mutant(
        algorithms.normalized_sgd_learner,
        "normalize(statistics, prediction, example.tasks)",
        "normalize(state.statistics, prediction, example.tasks)",
        {"info"},
    ),
}
