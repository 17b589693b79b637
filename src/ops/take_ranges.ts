import { check } from "../tensor/check.ts";
import { UsageError } from "../tensor/errors.ts";
import { sizeOf } from "../tensor/ndarray.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { copyColumns } from "./elementwise.ts";
import { defineOp } from "./op.ts";
import { movePieces } from "./pieces.ts";

/** First index and number of indices. */
export type Range = readonly [first: number, count: number];

interface Saved {
  readonly shape: readonly number[];
  readonly dim: number;
  readonly ranges: readonly Range[];
}

const taken = (ranges: readonly Range[]): number => ranges.reduce((sum, [, count]) => sum + count, 0);

/** A range in a row of x, and its place in a row of the result. */
interface Piece {
  readonly whole: number;
  readonly part: number;
  readonly width: number;
  /** The range stands further ahead, too. */
  readonly isRepeated: boolean;
}

function piecesOf({ shape, dim, ranges }: Saved): {
  rows: number; wholeCols: number; partCols: number; pieces: Piece[];
} {
  const inner = sizeOf(shape.slice(dim + 1));
  const seen = new Set<number>();
  let at = 0;
  const pieces = ranges.map(([first, count]): Piece => {
    const piece = { whole: first * inner, part: at, width: count * inner, isRepeated: seen.has(first) };
    seen.add(first);
    at += count * inner;
    return piece;
  });
  return { rows: sizeOf(shape.slice(0, dim)), wholeCols: shape[dim]! * inner, partCols: at, pieces };
}

/** Pieces of one width at equal distances in both rows are moved together. */
interface Series extends Omit<Piece, "isRepeated"> {
  readonly count: number;
  readonly wholeStep: number;
  readonly partStep: number;
}

function seriesOf(pieces: readonly Piece[]): Series[] {
  const series: Series[] = [];
  let left = [...pieces];
  for (let first = left[0]; first; first = left[0]) {
    const { whole, part, width } = first;
    const same = left.filter((other) => other.width === width);
    let longest: Piece[] = [first];
    for (const second of same) {
      const [wholeStep, partStep] = [second.whole - whole, second.part - part];
      if (wholeStep <= 0) continue;
      const along: Piece[] = [];
      for (let next: Piece | undefined = first; next;) {
        along.push(next);
        const { length } = along;
        next = same.find((other) =>
          other.whole === whole + length * wholeStep && other.part === part + length * partStep);
      }
      if (along.length > longest.length) longest = along;
    }
    const second = longest[1] ?? first;
    series.push({
      whole, part, width, count: longest.length, wholeStep: second.whole - whole,
      partStep: second.part - part,
    });
    const moved = new Set(longest);
    left = left.filter((other) => !moved.has(other));
  }
  return series;
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
    const { rows, wholeCols, partCols, pieces } = piecesOf(saved);
    for (const { whole, part, width, count, wholeStep, partStep } of seriesOf(pieces)) {
      movePieces([x], [y], { blocks: rows, inner: count, width },
        { first: whole, step: 0, block: wholeCols, row: wholeStep },
        { first: part, step: 0, block: partCols, row: partStep });
    }
    ctx.save(saved);
    return y;
  },
  backward(saved: Saved, [dy]) {
    if (!dy) return [];
    const { shape, dim, ranges } = saved;
    const distinct = ranges.filter(([first], i) => ranges.findIndex(([other]) => other === first) === i);
    const dx = taken(distinct) === shape[dim] ? dy.device.empty(shape) : dy.device.zeros(shape);
    const { rows, wholeCols, partCols, pieces } = piecesOf(saved);
    for (const { whole, part, width, count, wholeStep, partStep } of seriesOf(
      pieces.filter(({ isRepeated }) => !isRepeated))) {
      movePieces([dy], [dx], { blocks: rows, inner: count, width },
        { first: part, step: 0, block: partCols, row: partStep },
        { first: whole, step: 0, block: wholeCols, row: wholeStep });
    }
    for (const { whole, part, width, isRepeated } of pieces) {
      if (isRepeated) copyColumns(rows, width, { tensor: dy, cols: partCols, first: part },
        { tensor: dx, cols: wholeCols, first: whole }, true);
    }
    return [dx];
  },
});
