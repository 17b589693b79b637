import type { RowGroups } from "../ops/fake_quantize.ts";
import type { Rounding } from "../ops/rounding.ts";
import type { Tensor } from "../tensor/tensor.ts";

/** Knows how the products with a weight are rounded. */
export interface Roundings {
  /** @param key the weight's `Tensor.key` */
  of(key: number): ActiveRounding | null;
}

export interface ActiveRounding {
  /** For the op; of several ranks that of each. */
  readonly rounding: Rounding;
  /** Where tensors of several ranks have one scale; null: each op finds its own. */
  readonly shared: SharedScale | null;
}

/** Measures what several ranks hold of a tensor, before the op of the first of them needs its scale. */
export interface SharedScale {
  /** Sees x of all ranks before the product. */
  input(x: Tensor, groups: RowGroups | null): void;
  /** y, whose gradients are seen on their way back. */
  output(y: Tensor, groups: RowGroups | null): Tensor;
}

let active: Roundings | null = null;

/** Runs `body` with the products of layers rounded; null: as they are. Walks back belong inside too. */
export function withRoundings<T>(roundings: Roundings | null, body: () => T): T {
  const outer = active;
  active = roundings;
  try {
    return body();
  } finally {
    active = outer;
  }
}

/** How the products with this weight are rounded now; null: not at all. */
export function roundingOf(weight: { readonly key: number }): ActiveRounding | null {
  return active === null ? null : active.of(weight.key);
}
