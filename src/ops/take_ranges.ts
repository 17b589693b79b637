import { check } from "../tensor/check.ts";
import { UsageError } from "../tensor/errors.ts";
import { sizeOf } from "../tensor/ndarray.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { copyColumns } from "./elementwise.ts";
import { defineOp } from "./op.ts";

/** First index and number of indices. */
export type Range = readonly [first: number, count: number];

interface Saved {
  readonly shape: readonly number[];
  readonly dim: number;
  readonly ranges: readonly Range[];
}

const taken = (ranges: readonly Range[]): number => ranges.reduce((sum, [, count]) => sum + count, 0);

/** Calls `move` with the places of every range in a row of x and in one of the result. */
function forEachRange(
  { shape, dim, ranges }: Saved,
  move: (rows: number, width: number, whole: { cols: number; first: number },
    part: { cols: number; first: number }, isRepeated: boolean) => void,
): void {
  const inner = sizeOf(shape.slice(dim + 1));
  const rows = sizeOf(shape.slice(0, dim));
  const cols = shape[dim]! * inner;
  const seen = new Set<number>();
  let at = 0;
  for (const [first, count] of ranges) {
    const part = { cols: taken(ranges) * inner, first: at };
    move(rows, count * inner, { cols, first: first * inner }, part, seen.has(first));
    seen.add(first);
    at += count * inner;
  }
}

/**
 * Ranges of a dimension side by side.
 *
 * @param x       f32 [..., n, ...]
 * @param dim     the dimension
 * @param ranges  [first, count], each within n; two of them are the same or share no index
 * @returns f32 [..., sum of the counts, ...]; backward puts zeros where nothing was taken and adds repeats
 * @throws ShapeError for a range outside, UsageError for ranges that overlap
 */
export const take_ranges = defineOp({
  name: "take_ranges",
  forward(ctx, x: Tensor, dim: number, ranges: readonly Range[]): Tensor {
    const extent = x.shape[dim];
    check(extent !== undefined, "take_ranges", "dim", `below ${x.shape.length}`, dim);
    ranges.forEach(([first, count], i) => {
      const fits = first >= 0 && count >= 0 && first + count <= extent!;
      check(fits, "take_ranges", "a range", `within ${extent}`, [first, count]);
      for (const [before, size] of ranges.slice(0, i)) {
        const isSame = before === first && size === count;
        if (isSame || before + size <= first || first + count <= before) continue;
        throw new UsageError(
          "take_ranges: two ranges must be the same or share no index, " +
          `found [${before}, ${size}] and [${first}, ${count}].`);
      }
    });
    const y = x.device.empty(x.shape.map((n, i) => (i === dim ? taken(ranges) : n)));
    const saved = { shape: x.shape, dim, ranges };
    forEachRange(saved, (rows, width, whole, part) =>
      copyColumns(rows, width, { tensor: x, ...whole }, { tensor: y, ...part }));
    ctx.save(saved);
    return y;
  },
  backward(saved: Saved, [dy]) {
    if (!dy) return [];
    const { shape, dim, ranges } = saved;
    const distinct = ranges.filter(([first], i) => ranges.findIndex(([other]) => other === first) === i);
    const dx = taken(distinct) === shape[dim] ? dy.device.empty(shape) : dy.device.zeros(shape);
    forEachRange(saved, (rows, width, whole, part, isRepeated) =>
      copyColumns(rows, width, { tensor: dy, ...part }, { tensor: dx, ...whole }, isRepeated));
    return [dx];
  },
});
