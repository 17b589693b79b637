import type { NdArray } from "../tensor/ndarray.ts";

/** x as it is. */
export function watch_gradient(x: NdArray): NdArray {
  return x;
}

export function watch_gradient_vjp([dy]: readonly (NdArray | null)[]): (NdArray | null)[] {
  return [dy ?? null, null];
}
