/** Collectives of one group: the first argument says how, the rest are the tensors of its ranks, in order. */
import { ndarray, type NdArray, sizeOf } from "../tensor/ndarray.ts";

interface Slices {
  readonly dim: number;
}
type Grads = readonly (NdArray | null)[];
type Cotangents = (NdArray | null)[];

function filled(grads: Grads, shape: readonly number[]): NdArray[] {
  return grads.map((grad) => grad ?? ndarray(shape));
}

function total(xs: readonly NdArray[]): NdArray {
  return ndarray(xs[0]!.shape, xs[0]!.data.map((_, i) => xs.reduce((sum, { data }) => sum + data[i]!, 0)));
}

/** Part `i` of `parts` equal ones along a dimension. */
function slice({ shape, data }: NdArray, dim: number, i: number, parts: number): NdArray {
  const inner = sizeOf(shape.slice(dim + 1));
  const extent = shape[dim]! / parts;
  const out = ndarray(shape.map((n, d) => (d === dim ? extent : n)));
  const width = extent * inner;
  for (let r = 0; r < sizeOf(shape.slice(0, dim)); r++) {
    for (let c = 0; c < width; c++) out.data[r * width + c] = data[(r * parts + i) * width + c]!;
  }
  return out;
}

function join(xs: readonly NdArray[], dim: number): NdArray {
  const { shape } = xs[0]!;
  const width = sizeOf(shape.slice(dim));
  const out = ndarray(shape.map((n, d) => (d === dim ? n * xs.length : n)));
  xs.forEach(({ data }, i) => {
    for (let r = 0; r < sizeOf(shape.slice(0, dim)); r++) {
      for (let c = 0; c < width; c++) out.data[(r * xs.length + i) * width + c] = data[r * width + c]!;
    }
  });
  return out;
}

const allJoined = (xs: readonly NdArray[], dim: number) => xs.map(() => join(xs, dim));
const ownSlices = (xs: readonly NdArray[], dim: number) => xs.map((x, i) => slice(x, dim, i, xs.length));
const sumSlices = (xs: readonly NdArray[], dim: number) =>
  xs.map((_, i) => slice(total(xs), dim, i, xs.length));

/** The root's x on every rank; its gradient is the sum of all. */
export function broadcast({ root }: { readonly root: number }, ...xs: NdArray[]): NdArray[] {
  return xs.map(() => xs[root]!);
}

export function broadcast_vjp(
  grads: Grads, { root }: { readonly root: number }, ...xs: NdArray[]
): Cotangents {
  const dys = filled(grads, xs[0]!.shape);
  return [null, ...xs.map((x, i) => (i === root ? total(dys) : ndarray(x.shape)))];
}

/** Every rank's x as it is; gradients are summed. */
export function copy_to(_how: object, ...xs: NdArray[]): NdArray[] {
  return xs;
}

export function copy_to_vjp(grads: Grads, _how: object, ...xs: NdArray[]): Cotangents {
  const dys = filled(grads, xs[0]!.shape);
  return [null, ...xs.map(() => total(dys))];
}

/** The sum on every rank, which all of them use alike: a gradient is that of the sum already. */
export function reduce_from(_how: object, ...xs: NdArray[]): NdArray[] {
  return xs.map(() => total(xs));
}

export function reduce_from_vjp(grads: Grads, _how: object, ...xs: NdArray[]): Cotangents {
  return [null, ...filled(grads, xs[0]!.shape)];
}

/** The largest of every element, on every rank. */
export function largest_of(_how: object, ...xs: NdArray[]): NdArray[] {
  return xs.map((x) => ndarray(x.shape, x.data.map((_, i) => Math.max(...xs.map(({ data }) => data[i]!)))));
}

/** Rank i keeps slice i of its own tensor; the tensors are copies of one. */
export function scatter({ dim }: Slices, ...xs: NdArray[]): NdArray[] {
  return ownSlices(xs, dim);
}

export function scatter_vjp(grads: Grads, { dim }: Slices, ...xs: NdArray[]): Cotangents {
  return [null, ...allJoined(filled(grads, slice(xs[0]!, dim, 0, xs.length).shape), dim)];
}

/** All slices side by side, used differently by every rank (`sum`) or alike. */
export function gather({ dim }: Slices & { readonly sum: boolean }, ...xs: NdArray[]): NdArray[] {
  return allJoined(xs, dim);
}

export function gather_vjp(
  grads: Grads, { dim, sum }: Slices & { readonly sum: boolean }, ...xs: NdArray[]
): Cotangents {
  const dys = filled(grads, join(xs, dim).shape);
  return [null, ...(sum ? sumSlices(dys, dim) : ownSlices(dys, dim))];
}

/** Slice i of the sum for rank i. */
export function reduce_scatter({ dim }: Slices, ...xs: NdArray[]): NdArray[] {
  return sumSlices(xs, dim);
}

export function reduce_scatter_vjp(grads: Grads, { dim }: Slices, ...xs: NdArray[]): Cotangents {
  return [null, ...allJoined(filled(grads, slice(xs[0]!, dim, 0, xs.length).shape), dim)];
}

/** [B, L, C]: slice j along `cut` goes to rank j, which joins what it gets along the other dimension. */
export function all_to_all({ cut }: { readonly cut: 1 | 2 }, ...xs: NdArray[]): NdArray[] {
  return xs.map((_, j) => join(xs.map((x) => slice(x, cut, j, xs.length)), 3 - cut));
}

export function all_to_all_vjp(
  grads: Grads, { cut }: { readonly cut: 1 | 2 }, ...xs: NdArray[]
): Cotangents {
  const { shape } = all_to_all({ cut }, ...xs)[0]!;
  return [null, ...all_to_all({ cut: cut === 1 ? 2 : 1 }, ...filled(grads, shape))];
}

/** x as it is, elsewhere. */
export function send(_how: object, x: NdArray): NdArray {
  return x;
}

export function send_vjp([dy]: Grads, _how: object, x: NdArray): Cotangents {
  return [null, dy ?? ndarray(x.shape)];
}
