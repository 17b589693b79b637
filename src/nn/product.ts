/**
 * The products of layers: the ops of the same names, with their factors rounded where a training run asks for
 * it (`withRoundings`).
 */
import type { RowGroups } from "../ops/fake_quantize.ts";
import { grouped_linear as plainGrouped, type GroupedLinearOptions } from "../ops/grouped_linear.ts";
import { linear as plainLinear, type LinearOptions } from "../ops/linear.ts";
import type { Rounding } from "../ops/rounding.ts";
import { roundingOf } from "../precision/active.ts";
import { BlockTensor } from "../tensor/blocks.ts";
import type { Tensor } from "../tensor/tensor.ts";
import type { Weight } from "./weights.ts";

/** y = activation(x W^T + bias) + residual. */
export function linear(
  x: Tensor, weight: Weight, bias: Tensor | null, residual: Tensor | null = null, options: LinearOptions = {},
): Tensor {
  return rounded(x, weight, { x: null, y: null }, (rounding) =>
    plainLinear(x, weight, bias, residual, rounding ? { ...options, rounding } : options));
}

/** y[s] = activation(weight[e] x[s]) for the rows of every expert e. */
export function grouped_linear(
  x: Tensor, weight: Weight, offsets: Tensor, options: GroupedLinearOptions = {},
): Tensor {
  const { permute } = options;
  return rounded(x, weight, { x: { offsets, permute }, y: { offsets } }, (rounding) =>
    plainGrouped(x, weight, offsets, rounding ? { ...options, rounding } : options));
}

/** @param groups those of the rows of x and of y */
function rounded(
  x: Tensor, weight: Weight, groups: { readonly x: RowGroups | null; readonly y: RowGroups | null },
  product: (rounding: Rounding | null) => Tensor,
): Tensor {
  const found = weight instanceof BlockTensor ? null : roundingOf(weight);
  if (!found?.shared) return product(found && found.rounding);
  found.shared.input(x, groups.x);
  return found.shared.output(product(found.rounding), groups.y);
}
