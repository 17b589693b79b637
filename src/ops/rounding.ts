import type { RowGroups } from "./fake_quantize.ts";
import type { Tensor } from "../tensor/tensor.ts";

/** A factor of a weight's gradient: rows of x or of dy, rounded. */
export interface Summand {
  readonly tensor: Tensor;
  /**
   * Of grouped rows: where the groups begin in it, u32 [groups + 1]. The rows then lie in the order of the
   * groups, and those of no token are zero. Null: as the rows came.
   */
  readonly offsets: Tensor | null;
}

/**
 * How the factors of a product y = x W^T and of its two gradients are rounded before they are multiplied:
 * the option `rounding` of `linear` and `grouped_linear`. The gradient looks through the rounding.
 */
export interface Rounding {
  /** The weight's values for y. */
  forward(): Tensor;
  /** The weight's values for dx = dy W. */
  backward(): Tensor;
  /** x for y; and for dW = dy^T x, where `keeps`. */
  input(
    x: Tensor, keeps: boolean, groups: RowGroups | null,
  ): { readonly forward: Tensor; readonly kept: Summand | null };
  /** dy for dx and for dW, as far as they are wanted. */
  gradient(
    dy: Tensor, wants: { readonly x: boolean; readonly weight: boolean }, groups: RowGroups | null,
  ): { readonly backward: Tensor | null; readonly kept: Summand | null };
}
