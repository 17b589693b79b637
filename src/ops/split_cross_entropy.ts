/**
 * Cross entropy of logits whose vocabulary is cut into parts, one for each rank. Every rank makes statistics
 * of its own logits; what crosses between ranks is one number per row and statistic.
 *
 *   [lse, picked, total] = linear_log_sum_exp(h, rows of W, labels)   on every rank
 *   loss = merged_cross_entropy(lse of all parts, sum of picked, sum of total, labels)
 */
import { launch } from "../kernel/launch.ts";
import { check } from "../tensor/check.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { product } from "./gemm.ts";
import {
  logitGradients, type Logits, logitsExtents, type LogitsOptions, padded, walkLogits,
} from "./logits.ts";
import { defineOp } from "./op.ts";
import { sumRows } from "./sum_rows.ts";

export interface LogSumExpOptions extends LogitsOptions {
  /** Label of the first row of weight, where that is a part of the vocabulary; default 0. */
  readonly begin?: number;
  /** Give the sums of logits too. */
  readonly total?: boolean;
}

interface SavedParts {
  readonly logits: Logits;
  readonly labels: Tensor;
  readonly lse: Tensor;
  readonly begin: number;
}

const WG = 64;

/**
 * Statistics of the rows of logits z = h W^T, without the whole of them in memory: log sum_v exp(z[v]), the
 * label's z (0 where the label is in another part) and, if asked for, sum_v z[v].
 *
 * @param h       f32 [T, D]
 * @param weight  f32 [V, D]: the rows of labels begin .. begin + V - 1
 * @param labels  i32 [T]
 * @returns f32 [T], two or three of them
 * @throws ShapeError when widths or row counts differ
 */
export const linear_log_sum_exp = defineOp({
  name: "linear_log_sum_exp",
  forward(ctx, h: Tensor, weight: Tensor, labels: Tensor, options: LogSumExpOptions = {}): Tensor[] {
    const { T } = logitsExtents("linear_log_sum_exp", h, weight, labels);
    const { device } = h;
    const { begin = 0, total: asked = false } = options;
    const [lse, picked] = [device.empty([T]), device.zeros([T])];
    const lanes = { WG: device.info.isSoftware ? 4 : WG };
    const logits = walkLogits("linear_log_sum_exp", h, weight, options, (chunk, start, width) => {
      launch("loss/cross_entropy", {
        entry: "chunk_lse", bind: { logits: chunk, labels, lse, picked },
        params: { rows: T, stride: padded(width), width, chunk: begin + start, vocab: 0 },
        constants: lanes, conditions: start === 0 ? ["first"] : [], workgroups: [T],
      });
    });
    ctx.save({ logits, labels, lse, begin });
    return asked ? [lse, picked, totals(h, weight)] : [lse, picked];
  },
  backward({ logits, labels, lse, begin }: SavedParts, grads, needs, into) {
    if (grads.every((grad) => grad === null)) return [];
    const T = logits.h.shape[0]!;
    const [dlse, dpicked, dtotal] = [0, 1, 2].map((i) => grads[i] ?? logits.h.device.zeros([T])) as
      [Tensor, Tensor, Tensor];
    return logitGradients(logits, needs, into, (chunk, start, width, dlogits) => {
      const stride = padded(width);
      launch("loss/log_sum_exp_backward", {
        bind: { logits: chunk, labels, lse, dlse, dpicked, dtotal, dlogits },
        params: { rows: T, stride, width, chunk: begin + start },
        workgroups: [Math.ceil((T * stride) / 4 / WG)],
      });
    });
  },
});

/** sum_v (h W^T)[t, v] = h[t] . sum_v W[v] */
function totals(h: Tensor, weight: Tensor): Tensor {
  const [T, D] = h.shape as [number, number];
  const [sum, total] = [h.device.empty([D]), h.device.empty([T])];
  sumRows(weight, weight.shape[0]!, D, sum);
  product({
    m: T, n: 1, k: D, a: { tensor: h, row: D, col: 1 }, b: { tensor: sum, row: 1, col: D },
    c: { tensor: total, row: 1 },
  });
  return total;
}

export interface MergedCrossEntropyOptions {
  /** Words in all parts. */
  readonly vocab: number;
  /** Probability that the target gives to all other words alike, in [0, 1); default 0. */
  readonly label_smoothing?: number;
}

interface SavedMerge {
  readonly lse: Tensor;
  readonly merged: Tensor;
  readonly labels: Tensor;
  readonly scale: Tensor;
  readonly shares: Shares;
  readonly hasTotal: boolean;
}

/** loss = lse - keep * picked - spread * total */
interface Shares {
  readonly vocab: number;
  readonly keep: number;
  readonly spread: number;
}

/**
 * The mean cross entropy of rows from statistics of the parts of their logits: lse - picked, and with label
 * smoothing a, where K words share a' = a K / (K - 1): lse - (1 - a') picked - a' total / K. A row is scored
 * when its label lies in 0 .. K - 1; without scored rows the loss is 0.
 *
 * @param lse     f32 [parts, T]
 * @param picked  f32 [T], summed over the parts
 * @param total   f32 [T], summed over the parts; null without label smoothing
 * @param labels  i32 [T]
 * @returns f32 []
 * @throws ShapeError when row counts differ, or for a label_smoothing outside [0, 1) or without totals
 */
export const merged_cross_entropy = defineOp({
  name: "merged_cross_entropy",
  forward(
    ctx, lse: Tensor, picked: Tensor, total: Tensor | null, labels: Tensor,
    { vocab, label_smoothing = 0 }: MergedCrossEntropyOptions,
  ): Tensor {
    const name = "merged_cross_entropy";
    check(lse.shape.length === 2, name, "lse", "[parts, T]", lse);
    const [parts, T] = lse.shape as [number, number];
    for (const [what, x] of Object.entries({ picked, total, labels })) {
      check(!x || x.shape.join() === String(T), name, what, `[${T}]`, x!);
    }
    const isRate = label_smoothing >= 0 && label_smoothing < 1;
    check(isRate, name, "label_smoothing", "at least 0 and below 1", label_smoothing);
    check(label_smoothing === 0 || (total !== null && vocab > 1), name, "label_smoothing",
      "0 without totals of several words", label_smoothing);
    const shared = label_smoothing === 0 ? 0 : (label_smoothing * vocab) / (vocab - 1);
    const shares = { vocab, keep: 1 - shared, spread: shared / vocab };
    const { device } = lse;
    const [merged, scale, loss] = [device.empty([T]), device.empty([1]), device.empty([])];
    launch("loss/merged_cross_entropy", {
      entry: "merge", bind: { lse, picked, total: total ?? picked, labels, merged, scale, loss },
      params: { rows: T, parts, ...shares }, constants: { WG }, workgroups: [1],
    });
    ctx.save({ lse, merged, labels, scale, shares, hasTotal: total !== null });
    return loss;
  },
  backward({ lse, merged, labels, scale, shares, hasTotal }: SavedMerge, [dloss], needs) {
    if (!dloss) return [];
    const { device } = lse;
    const [parts, T] = lse.shape as [number, number];
    const [dlse, dpicked, dtotal] = [device.empty(lse.shape), device.empty([T]), device.empty([T])];
    launch("loss/merged_cross_entropy", {
      entry: "unmerge", bind: { lse, merged, labels, scale, dloss, dlse, dpicked, dtotal },
      params: { rows: T, parts, ...shares }, constants: { WG }, workgroups: [Math.ceil(T / WG)],
    });
    return [needs[0] ? dlse : null, needs[1] ? dpicked : null, hasTotal && needs[2] ? dtotal : null];
  },
});
