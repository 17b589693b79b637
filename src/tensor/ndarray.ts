import { ShapeError } from "./errors.ts";

/** A row-major array of doubles (integers too): what references compute with and what tests compare. */
export interface NdArray {
  readonly shape: readonly number[];
  readonly data: Float64Array;
}

/** Largest element count a shape may have: beyond it an index is no longer an exact double. */
export const MAX_ELEMENTS = Number.MAX_SAFE_INTEGER;

/**
 * Product of the extents; 1 for the empty (scalar) shape.
 * Throws ShapeError for an extent that is not a whole number >= 0 and for a product above 2^53 - 1.
 */
export function sizeOf(shape: readonly number[]): number {
  let empty = false;
  for (const extent of shape) {
    if (!Number.isSafeInteger(extent) || extent < 0) {
      throw new ShapeError(`shape [${shape.join(", ")}]: extents must be integers >= 0, found ${extent}`);
    }
    empty ||= extent === 0;
  }
  if (empty) return 0;
  let size = 1;
  for (const extent of shape) {
    // Divide instead of multiplying first: a product beyond 2^53 would already have lost bits.
    if (extent > Math.floor(MAX_ELEMENTS / size)) {
      throw new ShapeError(`shape [${shape.join(", ")}]: at most 2^53 - 1 elements are possible`);
    }
    size *= extent;
  }
  return size;
}

/** Makes an NdArray of zeros, or of `data` (copied, unless it is a Float64Array, which is kept). */
export function ndarray(shape: readonly number[], data?: ArrayLike<number>): NdArray {
  const size = sizeOf(shape);
  if (data && data.length !== size) {
    throw new ShapeError(`ndarray [${shape.join(", ")}]: expected ${size} values, found ${data.length}`);
  }
  if (data instanceof Float64Array) return { shape: [...shape], data };
  return { shape: [...shape], data: data ? Float64Array.from(data) : new Float64Array(size) };
}
