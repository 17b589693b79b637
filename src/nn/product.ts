/**
 * The products of layers: the ops of the same names, with their factors rounded where a training run asks for
 * it (`withRoundings`).
 */
import { grouped_linear as plainGrouped, type GroupedLinearOptions } from "../ops/grouped_linear.ts";
import { linear as plainLinear, type LinearOptions } from "../ops/linear.ts";
import { roundingOf } from "../precision/active.ts";
import { BlockTensor } from "../tensor/blocks.ts";
import type { Tensor } from "../tensor/tensor.ts";
import type { Weight } from "./weights.ts";

/** y = activation(x W^T + bias) + residual. */
export function linear(
  x: Tensor, weight: Weight, bias: Tensor | null, residual: Tensor | null = null, options: LinearOptions = {},
): Tensor {
  const rounding = weight instanceof BlockTensor ? null : roundingOf(weight);
  return plainLinear(x, weight, bias, residual, rounding ? { ...options, rounding } : options);
}

/** y[s] = activation(weight[e] x[s]) for the rows of every expert e. */
export function grouped_linear(
  x: Tensor, weight: Weight, offsets: Tensor, options: GroupedLinearOptions = {},
): Tensor {
  const rounding = weight instanceof BlockTensor ? null : roundingOf(weight);
  return plainGrouped(x, weight, offsets, rounding ? { ...options, rounding } : options);
}
