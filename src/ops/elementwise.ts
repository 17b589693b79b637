import { launch } from "../kernel/launch.ts";
import { check } from "../tensor/check.ts";
import type { Device } from "../tensor/device.ts";
import { UsageError } from "../tensor/errors.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { defineOp } from "./op.ts";
import { sumRows } from "./sum_rows.ts";

const WG = 64;

/** How elements are shared out (shaders/lib/share.wgsl): in stretches for a CPU, interleaved for a GPU. */
function spread(device: Device, size: number, isWide = size % 4 === 0) {
  const count = isWide ? size / 4 : size;
  const { isSoftware } = device.info;
  const [WG, EACH] = [isSoftware ? 64 : 256, 4];
  return {
    count, constants: { WG, EACH, APART: isSoftware ? 1 : WG }, conditions: isWide ? ["vec4" as const] : [],
    workgroups: [Math.ceil(count / (WG * EACH))] as [number],
  };
}

function checkSameShape(op: string, what: string, found: Tensor, like: Tensor): void {
  check(found.shape.join() === like.shape.join(), op, what, `[${like.shape.join(", ")}]`, found);
}

/**
 * a + b
 *
 * @param a  f32, any shape; b has the same shape
 * @throws ShapeError when the shapes differ
 */
export const add = defineOp({
  name: "add",
  forward(_ctx, a: Tensor, b: Tensor): Tensor {
    checkSameShape("add", "b", b, a);
    const y = a.device.empty(a.shape);
    const { count, ...how } = spread(a.device, a.size);
    launch("elementwise/add", { bind: { a, b, y }, params: { count }, ...how });
    return y;
  },
  backward: (_saved, [dy]) => [dy, dy],
});

/** a * b, element by element. f32, both of one shape. @throws ShapeError when the shapes differ */
export const multiply = defineOp({
  name: "multiply",
  forward(ctx, a: Tensor, b: Tensor): Tensor {
    checkSameShape("multiply", "b", b, a);
    ctx.save({ a, b });
    return productOf(a, b);
  },
  backward: ({ a, b }: { a: Tensor; b: Tensor }, [dy]) => (dy ? [productOf(b, dy), productOf(a, dy)] : []),
});

function productOf(a: Tensor, b: Tensor): Tensor {
  const y = a.device.empty(a.shape);
  const { count, ...how } = spread(a.device, a.size);
  launch("elementwise/multiply", { bind: { a, b, y }, params: { count }, ...how });
  return y;
}

/**
 * x + bias + residual, the residual last, as `linear` adds them.
 *
 * @param x         f32 [..., C]
 * @param bias      f32 [C]
 * @param residual  f32 [..., C], or null
 * @throws ShapeError when the shapes differ
 */
export const add_bias = defineOp({
  name: "add_bias",
  forward(ctx, x: Tensor, bias: Tensor, residual: Tensor | null = null): Tensor {
    check(x.shape.length >= 1, "add_bias", "x", "[..., C]", x);
    const C = x.shape.at(-1)!;
    check(bias.shape.join() === String(C), "add_bias", "bias", `[${C}]`, bias);
    if (residual) checkSameShape("add_bias", "residual", residual, x);
    const y = x.device.empty(x.shape);
    const isWide = C % 4 === 0;
    const { count, conditions, ...how } = spread(x.device, x.size, isWide);
    launch("elementwise/add_bias", {
      bind: { x, bias, y, residual: residual ?? x }, params: { count, cols: isWide ? C / 4 : C },
      conditions: residual ? [...conditions, "residual"] : conditions, ...how,
    });
    ctx.save({ C });
    return y;
  },
  backward({ C }: { C: number }, [dy], needs, into) {
    if (!dy) return [];
    const dbias = needs[1] ? into.empty(1, { device: dy.device, shape: [C] }) : null;
    if (dbias) sumRows(dy, dy.size / Math.max(C, 1), C, dbias);
    return [dy, dbias, needs[2] ? dy : null];
  },
});

/**
 * dst += src, in place.
 *
 * @param dst  f32, any shape, changed; src has the same shape
 * @throws ShapeError when the shapes differ
 */
export const accumulate = defineOp({
  name: "accumulate",
  mutates: [0],
  forward(_ctx, dst: Tensor, src: Tensor): Tensor[] {
    checkSameShape("accumulate", "src", src, dst);
    const { count, conditions, ...how } = spread(dst.device, dst.size);
    launch("elementwise/add", {
      bind: { a: src, b: src, y: dst }, params: { count }, conditions: [...conditions, "in_place"], ...how,
    });
    return [];
  },
});

type Curve = "relu2" | "silu";

function unary(x: Tensor, curve: Curve | null, s = 0): Tensor {
  const y = x.device.empty(x.shape);
  const { count, conditions, ...how } = spread(x.device, x.size);
  launch("elementwise/unary", {
    bind: { x, y }, params: { count, s }, conditions: curve ? [...conditions, curve] : conditions, ...how,
  });
  return y;
}

function unaryBackward(x: Tensor, dy: Tensor, curve: Curve): Tensor {
  const dx = x.device.empty(x.shape);
  const { count, conditions, ...how } = spread(x.device, x.size);
  launch("elementwise/unary_backward", {
    bind: { x, dy, dx }, params: { count },
    conditions: curve === "silu" ? [...conditions, curve] : conditions, ...how,
  });
  return dx;
}

/** x * s for a number s. x f32, any shape. */
export const scale = defineOp({
  name: "scale",
  forward(ctx, x: Tensor, s: number): Tensor {
    ctx.save({ s });
    return unary(x, null, s);
  },
  backward: ({ s }: { s: number }, [dy]) => (dy ? [unary(dy, null, s)] : []),
});

/** max(x, 0)^2. x f32, any shape; dx = 2 max(x, 0) dy. */
export const relu2 = defineOp({
  name: "relu2",
  forward(ctx, x: Tensor): Tensor {
    ctx.save({ x });
    return unary(x, "relu2");
  },
  backward: ({ x }: { x: Tensor }, [dy]) => (dy ? [unaryBackward(x, dy, "relu2")] : []),
});

/** x * sigmoid(x). x f32, any shape; dx = dy * s * (1 + x * (1 - s)) with s = sigmoid(x). */
export const silu = defineOp({
  name: "silu",
  forward(ctx, x: Tensor): Tensor {
    ctx.save({ x });
    return unary(x, "silu");
  },
  backward: ({ x }: { x: Tensor }, [dy]) => (dy ? [unaryBackward(x, dy, "silu")] : []),
});

/** Columns of a matrix stored row by row: `cols` values per row, the columns from `first` on. */
export interface ColumnBlock {
  readonly tensor: Tensor;
  readonly cols: number;
  readonly first: number;
}

/** dst[r, dst.first + c] = src[r, src.first + c] for r < rows and c < width; or += where `add` (f32). */
export function copyColumns(
  rows: number, width: number, src: ColumnBlock, dst: ColumnBlock, add = false,
): void {
  const isWide = [width, src.cols, src.first, dst.cols, dst.first].every((n) => n % 4 === 0);
  const unit = isWide ? 4 : 1;
  const parts = Math.max(1, Math.ceil(width / unit / (src.tensor.device.info.isSoftware ? 16 : 2)));
  launch("elementwise/columns", {
    bind: { src: src.tensor, dst: dst.tensor },
    params: {
      rows, parts, width: width / unit, src_cols: src.cols / unit, src_first: src.first / unit,
      dst_cols: dst.cols / unit, dst_first: dst.first / unit,
    },
    constants: { WG }, conditions: [...isWide ? ["vec4" as const] : [], ...add ? ["add" as const] : []],
    workgroups: [width === 0 ? 0 : Math.ceil((rows * parts) / WG)],
  });
}

const columnsOf = (x: Tensor): number => x.shape.at(-1)!;
const rowsOf = (x: Tensor): number => x.shape.slice(0, -1).reduce((a, b) => a * b, 1);
const withColumns = (x: Tensor, cols: number): number[] => [...x.shape.slice(0, -1), cols];

/** Copies between a tensor and the parts that lie side by side in its rows, three parts to a launch. */
function moveParts(entry: "split" | "join", whole: Tensor, parts: readonly Tensor[]): void {
  const rows = rowsOf(whole);
  let first = 0;
  for (let i = 0; i < parts.length; i += 3) {
    const widths = [0, 1, 2].map((j) => (parts[i + j] ? columnsOf(parts[i + j]!) : 0));
    const [width0, width1, width2] = widths as [number, number, number];
    const total = width0 + width1 + width2;
    const isWide = [columnsOf(whole), first, ...widths].every((n) => n % 4 === 0);
    const unit = isWide ? 4 : 1;
    const each = Math.max(1, Math.ceil(total / unit / (whole.device.info.isSoftware ? 16 : 2)));
    const part = (j: number) => parts[i + j] ?? whole.device.empty([0]);
    launch("elementwise/parts", {
      entry,
      bind: entry === "split"
        ? { src: whole, out0: part(0), out1: part(1), out2: part(2) }
        : { dst: whole, in0: part(0), in1: part(1), in2: part(2) },
      params: {
        rows, cols: columnsOf(whole) / unit, first: first / unit, width0: width0 / unit,
        width1: width1 / unit, width2: width2 / unit, parts: each,
      },
      constants: { WG }, conditions: isWide ? ["vec4"] : [],
      workgroups: [total === 0 ? 0 : Math.ceil((rows * each) / WG)],
    });
    first += total;
  }
}

/**
 * Columns of x as separate tensors.
 *
 * @param x       f32 [..., C]
 * @param widths  columns of each part, adding up to C
 * @returns one tensor [..., width] per part (copies); backward writes them side by side
 * @throws ShapeError when the widths do not add up
 */
export const split_columns = defineOp({
  name: "split_columns",
  forward(ctx, x: Tensor, widths: readonly number[]): Tensor[] {
    check(x.shape.length > 0, "split_columns", "x", "[..., C]", x);
    const cols = columnsOf(x);
    const total = widths.reduce((a, b) => a + b, 0);
    check(total === cols, "split_columns", "the sum of the widths", String(cols), total);
    ctx.save({ shape: x.shape, widths });
    const parts = widths.map((width) => x.device.empty(withColumns(x, width), x.dtype));
    moveParts("split", x, parts);
    return parts;
  },
  backward({ shape, widths }: { shape: readonly number[]; widths: readonly number[] }, grads, _needs, into) {
    const { device } = grads.find((grad) => grad !== null)!;
    const dx = into.empty(0, { device, shape });
    moveParts("join", dx, widths.map((width, i) => grads[i] ?? device.zeros([...shape.slice(0, -1), width])));
    return [dx];
  },
});

/**
 * a and b side by side.
 *
 * @param a  f32 [..., Ca]; b f32 [..., Cb]
 * @returns f32 [..., Ca + Cb]
 * @throws ShapeError when they differ in another dimension than the last
 */
export const concat_columns = defineOp({
  name: "concat_columns",
  forward(ctx, a: Tensor, b: Tensor): Tensor {
    check(a.shape.length > 0, "concat_columns", "a", "[..., Ca]", a);
    const [Ca, Cb] = [columnsOf(a), b.shape.at(-1) ?? 0];
    const expected = withColumns(a, Cb);
    check(b.shape.join() === expected.join(), "concat_columns", "b", `[${expected.join(", ")}]`, b);
    const y = a.device.empty(withColumns(a, Ca + Cb));
    moveParts("join", y, [a, b]);
    ctx.save({ widths: [Ca, Cb] });
    return y;
  },
  backward: ({ widths }: { widths: number[] }, [dy]) => (dy ? split_columns(dy, widths) : []),
});

/**
 * Later rows moved to the front: y[b, t] = x[b, t + n] for t < L - n.
 *
 * @param x  f32 [B, L, D]
 * @param n  0 .. L
 * @returns f32 [B, L - n, D]; backward puts zeros into the first n rows
 * @throws ShapeError for another rank, UsageError for an n out of range
 */
export const shift_rows = defineOp({
  name: "shift_rows",
  forward(ctx, x: Tensor, n: number): Tensor {
    check(x.shape.length === 3, "shift_rows", "x", "[B, L, D]", x);
    const [B, L, D] = x.shape as [number, number, number];
    if (!Number.isInteger(n) || n < 0 || n > L) {
      throw new UsageError(`shift_rows: n must be a whole number from 0 to ${L}, found ${n}.`);
    }
    const kept = (L - n) * D;
    const y = x.device.empty([B, L - n, D]);
    copyColumns(B, kept, { tensor: x, cols: L * D, first: n * D }, { tensor: y, cols: kept, first: 0 });
    ctx.save({ shape: x.shape, n });
    return y;
  },
  backward({ shape, n }: { shape: readonly number[]; n: number }, [dy]) {
    if (!dy) return [];
    const [B, L, D] = shape as [number, number, number];
    const kept = (L - n) * D;
    const dx = n === 0 ? dy.device.empty(shape) : dy.device.zeros(shape);
    copyColumns(B, kept, { tensor: dy, cols: kept, first: 0 }, { tensor: dx, cols: L * D, first: n * D });
    return [dx];
  },
});
