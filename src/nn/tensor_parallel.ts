/**
 * Products whose weights are cut over the ranks of `division.tp`. A layer enters with what it reads,
 * multiplies by its rank's outputs (column parallel) and then by its rank's inputs (row parallel), which
 * gives a part of a sum; leaving adds the parts. Under sequence parallel a rank holds a part of the positions
 * outside of such a pair, so entering gathers and leaving scatters. Spec: Megatron Core's mappings.
 */
import { copyToGroup, gatherFromGroup, reduceScatterInGroup, sumOverGroup } from "../ops/collectives.ts";
import { add, add_bias } from "../ops/elementwise.ts";
import { embedding } from "../ops/embedding.ts";
import { linear_cross_entropy } from "../ops/linear_cross_entropy.ts";
import { linear_log_sum_exp, merged_cross_entropy } from "../ops/split_cross_entropy.ts";
import { perRank } from "../tensor/sharded.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { type Division, placesIn, sizeOfGroup } from "./division.ts";
import { linear } from "./product.ts";
import type { Weight } from "./weights.ts";

/** The dimension of positions: the last but one. */
function positionsOf(x: Tensor): number {
  return x.shape.length - 2;
}

/** What column-parallel products read: [..., positions, D], all positions of it. */
export function enter(x: Tensor, { tp, sp }: Division): Tensor {
  return sp ? gatherFromGroup(x, tp, positionsOf(x), true) : copyToGroup(x, tp);
}

/** The sum of the ranks' parts [..., positions, D], or the rank's own positions of it. */
export function leave(x: Tensor, { tp, sp }: Division): Tensor {
  return sp ? reduceScatterInGroup(x, tp, positionsOf(x)) : sumOverGroup(x, tp);
}

/**
 * x W^T + bias + residual, of which every rank of `division.tp` holds some of the inputs.
 * @param x        [..., positions, inputs / tp]
 * @param weight   [N, inputs / tp]
 * @param bias     [N], added once; or null
 * @param residual [..., positions, N], the rank's own positions under sequence parallel; or null
 */
export function rowLinear(
  x: Tensor, weight: Weight, bias: Tensor | null, residual: Tensor | null, division: Division,
): Tensor {
  if (sizeOfGroup(division.tp) === 1) return linear(x, weight, bias, residual);
  const y = leave(linear(x, weight, null), division);
  if (bias) return add_bias(y, bias, residual);
  return residual ? add(y, residual) : y;
}

/**
 * Rows of a table that is cut over `division.tp`; the rank's own positions of them under sequence parallel.
 * @param ids    i32 [batch, seqlen], the same on all ranks
 * @param weight [vocabulary / tp, D]
 */
export function tableRows(ids: Tensor, weight: Weight, division: Division): Tensor {
  if (sizeOfGroup(division.tp) === 1) return embedding(ids, weight);
  return leave(embedding(ids, weight, firstRows(weight, division)), division);
}

/** The rank's first row of a table that is cut over `division.tp`. */
function firstRows(weight: Weight, { tp }: Division): number {
  return perRank(placesIn(tp).map((place) => place * weight.shape[0]!));
}

/**
 * Mean cross entropy of rows against a head that is cut over `division.tp`; a scalar, the same on all of its
 * ranks. Logits never leave their rank, nor are they whole on it: what is exchanged is one number per row.
 * @param h       f32 [T, D], entered
 * @param weight  f32 [vocabulary / tp, D]
 * @param labels  i32 [T]; rows with labels outside of the vocabulary do not count
 * @param label_smoothing probability that the target gives to all other words alike
 */
export function vocabularyCrossEntropy(
  h: Tensor, weight: Tensor, labels: Tensor, division: Division, label_smoothing = 0,
): Tensor {
  const { tp } = division;
  const parts = sizeOfGroup(tp);
  if (parts === 1 && label_smoothing === 0) return linear_cross_entropy(h, weight, labels, {});
  const [lse, picked, total] = linear_log_sum_exp(
    h, weight, labels, { begin: firstRows(weight, division), total: label_smoothing > 0 },
  ) as [Tensor, Tensor, Tensor | undefined];
  const lses = gatherFromGroup(lse.reshape([1, lse.size]), tp, 0, false);
  return merged_cross_entropy(
    lses, sumOverGroup(picked, tp), total ? sumOverGroup(total, tp) : null, labels,
    { vocab: parts * weight.shape[0]!, label_smoothing });
}
