import { launch } from "../kernel/launch.ts";
import { check } from "../tensor/check.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { defineOp } from "./op.ts";

function sizes(op: string, logits: Tensor): { rows: number; vocab: number } {
  const [, vocab = 0] = logits.shape;
  check(logits.shape.length === 2 && vocab >= 1, op, "logits", "[B, V] with V of at least 1", logits);
  return { rows: logits.shape[0]!, vocab: logits.shape[1]! };
}

/**
 * Invocations per row: many on hardware; on software adapters one vector register of them, since each further
 * one makes every barrier dearer and none runs beside another.
 */
const widthFor = (logits: Tensor): { WG: number } => ({ WG: logits.device.info.isSoftware ? 8 : 128 });

/**
 * Index of the largest logit of each row, the lowest index on ties.
 *
 * @param logits  f32 [B, V]
 * @returns u32 [B]
 */
export const argmax = defineOp({
  name: "argmax",
  forward(_ctx, logits: Tensor): Tensor {
    const params = sizes("argmax", logits);
    const token = logits.device.empty([params.rows], "u32");
    launch("sample/argmax", {
      bind: { logits, token }, params, constants: widthFor(logits), workgroups: [params.rows],
    });
    return token;
  },
});

/** Where the filters end in each row: u32 [B, 4], see shaders/lib/sampling.wgsl. */
function filterTokens(logits: Tensor, settings: Tensor, op: string): Tensor {
  const params = sizes(op, logits);
  check(settings.size === 4, op, "settings", "[4]", settings);
  const cuts = logits.device.empty([params.rows, 4], "u32");
  // Wide digits save passes over the row, if it is long enough to pay for clearing the larger histogram.
  const BITS = logits.device.info.isSoftware && params.vocab > 2048 ? 8 : 4;
  launch("sample/filter", {
    bind: { logits, settings, cuts }, params, constants: { ...widthFor(logits), BITS, DIGITS: 2 ** BITS },
    workgroups: [params.rows],
  });
  return cuts;
}

/**
 * The distribution that `sample` draws from: filtered and renormalised.
 *
 * The filters, in this order, keep ever shorter prefixes of the tokens in order of falling logit (rising
 * index on ties, so that exactly top_k stay): temperature; the top_k first; the shortest prefix with at least
 * top_p of the mass that is left, but one token at least; tokens with at least min_p times the largest
 * probability.
 *
 * @param logits    f32 [B, V]; masked tokens may be -infinity or a large negative number
 * @param settings  f32 [4]: temperature (below 1e-5: all on the arg-max), top_k (0 = off), top_p (1 = off),
 *   min_p (0 = off)
 * @returns f32 [B, V], rows adding up to 1
 */
export const probabilities = defineOp({
  name: "probabilities",
  forward(_ctx, logits: Tensor, settings: Tensor): Tensor {
    const params = sizes("probabilities", logits);
    const cuts = filterTokens(logits, settings, "probabilities");
    const probability = logits.device.empty(logits.shape);
    launch("sample/probabilities", {
      bind: { logits, settings, cuts, probability }, params, constants: widthFor(logits),
      workgroups: [params.rows],
    });
    return probability;
  },
});

/**
 * Draws one token per row from `probabilities(logits, settings)`: the first index whose cumulative
 * probability exceeds the Philox4x32-10 uniform of (seed, stream, step, row).
 *
 * Settings and counter are tensors, so that a captured decode step can be replayed with new ones.
 *
 * @param logits    f32 [B, V]
 * @param settings  f32 [4], as for `probabilities`; temperature 0 is `argmax`
 * @param counter   u32 [4]: seed low word, seed high word, step, stream
 * @returns u32 [B]
 */
export const sample = defineOp({
  name: "sample",
  forward(_ctx, logits: Tensor, settings: Tensor, counter: Tensor): Tensor {
    const params = sizes("sample", logits);
    check(counter.size === 4, "sample", "counter", "[4]", counter);
    const cuts = filterTokens(logits, settings, "sample");
    const token = logits.device.empty([params.rows], "u32");
    launch("sample/draw", {
      bind: { logits, settings, cuts, counter, token }, params, constants: widthFor(logits),
      workgroups: [params.rows],
    });
    return token;
  },
});
