import type { Rounding } from "../ops/rounding.ts";

/** Knows how the products with a weight are rounded. */
export interface Roundings {
  /** @param key the weight's `Tensor.key` */
  of(key: number): Rounding | null;
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
export function roundingOf(weight: { readonly key: number }): Rounding | null {
  return active === null ? null : active.of(weight.key);
}
