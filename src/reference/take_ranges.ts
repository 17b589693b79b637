import { ndarray, type NdArray, sizeOf } from "../tensor/ndarray.ts";

type Ranges = readonly (readonly [number, number])[];

/** For every element of the result where it comes from. */
function sources(shape: readonly number[], dim: number, ranges: Ranges): { shape: number[]; from: number[] } {
  const inner = sizeOf(shape.slice(dim + 1));
  const rows = sizeOf(shape.slice(0, dim));
  const taken = ranges.flatMap(([first, count]) => Array.from({ length: count }, (_, i) => first + i));
  const from: number[] = [];
  for (let r = 0; r < rows; r++) {
    for (const i of taken) {
      for (let c = 0; c < inner; c++) from.push((r * shape[dim]! + i) * inner + c);
    }
  }
  return { shape: shape.map((n, d) => (d === dim ? taken.length : n)), from };
}

/** Ranges [first, count] of a dimension side by side; one may stand there several times. */
export function take_ranges(x: NdArray, dim: number, ranges: Ranges): NdArray {
  const { shape, from } = sources(x.shape, dim, ranges);
  return ndarray(shape, Float64Array.from(from, (i) => x.data[i]!));
}

/** Zeros where nothing was taken, sums where several copies were. */
export function take_ranges_vjp(
  [dy]: readonly (NdArray | null)[], x: NdArray, dim: number, ranges: Ranges,
): (NdArray | null)[] {
  const dx = ndarray(x.shape);
  if (dy) {
    sources(x.shape, dim, ranges).from.forEach((i, j) => {
      dx.data[i]! += dy.data[j]!;
    });
  }
  return [dx, null, null];
}
