/** The matrix products that ops are made of: the choice of a kernel and its layout. Not an op itself. */
import { launch } from "../kernel/launch.ts";
import { bucket, choose, defineTunable } from "../kernel/tuner.ts";
import type { Device } from "../tensor/device.ts";
import { type HalfDType, isHalf, type Tensor } from "../tensor/tensor.ts";
import { randomTensor, trial } from "../tensor/trial.ts";
import { cast, convert } from "./cast.ts";
import { add } from "./elementwise.ts";

/**
 * Kernels for a product: `quad` keeps 16 x 16 tiles in the registers of four invocations (software adapters),
 * `tile` and `tile_large` stage 64 x 64 and 128 x 128 tiles in workgroup memory (GPUs, and wherever there are
 * no subgroups).
 */
export type ProductKernel = "quad" | "tile" | "tile_large";
/** Number formats of factors and results. */
export type FloatDType = "f32" | HalfDType;
/** Kernels for few rows: `matvec_quad` for software adapters, `matvec` for GPUs. */
export type VectorKernel = "matvec_quad" | "matvec";

/** A matrix, or a batch of them, inside a tensor: strides and offset in elements. */
export interface Matrix {
  readonly tensor: Tensor;
  readonly row: number;
  readonly col: number;
  readonly batch?: number;
  readonly offset?: number;
}

/**
 * c = a b: a [m, k], b [k, n], c [m, n] with neighbouring columns, `batches` times; each f32, f16 or bf16.
 * Sums are f32; the epilogue is, in this order: bias, relu2, relu2_of, residual, accumulate.
 */
export interface Product {
  readonly m: number;
  readonly n: number;
  readonly k: number;
  readonly batches?: number;
  readonly a: Omit<Matrix, "offset">;
  readonly b: Matrix;
  readonly c: Omit<Matrix, "col">;
  /** f32 [n], added to every row. */
  readonly bias?: Tensor | null;
  /** max(x, 0)^2 of every element. */
  readonly relu2?: boolean;
  /** f32 of c's layout, max(h, 0)^2: multiplies by the derivative 2 max(h, 0). Excludes `residual`. */
  readonly relu2_of?: Tensor | null;
  /** f32 of c's layout, added. */
  readonly residual?: Tensor | null;
  /** c += a b instead of c = a b. */
  readonly accumulate?: boolean;
  /** Row tiles from `groupedTiles`: each names its rows and the matrix of b. */
  readonly tiles?: Tensor;
  /** u32 [batches + 1]: matrix e of c sums over k in offsets[e] .. offsets[e + 1]. */
  readonly offsets?: Tensor;
  /** u32: row r of a (of b, with `offsets`) is row floor(table[r] / per) of what is stored. */
  readonly gather?: { readonly table: Tensor; readonly per: number } | null;
  readonly kernel?: ProductKernel | undefined;
}

const TILE = {
  quad: { rows: 16, columns: 16, per_workgroup: 4 },
  tile: { rows: 64, columns: 64, per_workgroup: 1 },
  tile_large: { rows: 128, columns: 128, per_workgroup: 1 },
} as const;
/**
 * A sum over k is split where there are fewer workgroups, but not into parts shorter than SPLIT_K: on a
 * processor another launch costs as much as a long loop.
 */
const WANTED = { quad: 4, tile: 128, tile_large: 128 } as const;
const SPLIT_K = { quad: 2048, tile: 128, tile_large: 128 } as const;
const WG = 32; // of sum_rows and grouped_tiles

/**
 * What the choice of a product's kernel depends on; `trans` as in matmul, `halves` when a or b is stored so.
 */
type ProductShape = {
  readonly m: number; readonly n: number; readonly k: number; readonly batches: number;
  readonly transA: boolean; readonly transB: boolean; readonly halves: boolean;
};

/** The kernel of a product without groups. */
const productTuning = defineTunable({
  name: "matmul/product",
  classOf: (shape: ProductShape) => ({
    ...shape, m: bucket(shape.m), n: bucket(shape.n), k: bucket(shape.k), batches: bucket(shape.batches, 64),
  }),
  candidates: (device: Device, { m, n }): ProductKernel[] => [
    ...(device.hasSubgroups ? ["quad" as const] : []), "tile" as const,
    ...(device.info.isSoftware || Math.min(m, n) < 128 ? [] : ["tile_large" as const]),
  ],
  fallback: (device, { m, n, batches }) => {
    if (device.info.isSoftware) return productKernel(device);
    // Large tiles need enough workgroups to occupy a GPU.
    const large = Math.min(m, n) >= 128 && Math.ceil(m / 128) * Math.ceil(n / 128) * batches >= 64;
    return large ? "tile_large" : "tile";
  },
  trial: (device, { m, n, k, batches, transA, transB, halves }) => trial(() => {
    const factor = (shape: number[], stream: number) => {
      const drawn = randomTensor(device, shape, stream, k ** -0.25);
      return halves ? converted(drawn, "f16") : drawn;
    };
    return { a: factor([batches, m, k], 0), b: factor([batches, k, n], 1) };
  }, ({ a, b }, kernel: ProductKernel) => {
    const c = device.empty([batches, m, n]);
    const [a_row, a_col, b_row, b_col] = [transA ? 1 : k, transA ? m : 1, transB ? 1 : n, transB ? k : 1];
    product({
      m, n, k, batches, kernel, a: { tensor: a, row: a_row, col: a_col, batch: m * k },
      b: { tensor: b, row: b_row, col: b_col, batch: k * n }, c: { tensor: c, row: n, batch: m * n },
    });
    return c;
  }),
  tolerance: ({ k }) => 8 * Math.sqrt(Math.max(k, 1)) * 2 ** -24,
});

/**
 * The kernel for products on a device: the wanted one where it can run, or the one that suits the adapter.
 */
export function productKernel(device: Device, wanted?: string): ProductKernel {
  if (wanted === "tile" || wanted === "tile_large") return wanted;
  return device.hasSubgroups && (wanted === "quad" || device.info.isSoftware) ? "quad" : "tile";
}

/** Rows per tile of a grouped product. */
export function tileRows(kernel: ProductKernel): number {
  return TILE[kernel].rows;
}

/** Records a product. */
export function product(p: Product): void {
  const { m, n, a, b, c, batches = 1 } = p;
  const { device } = c.tensor;
  const kernel = p.kernel ? productKernel(device, p.kernel) : choose(device, productTuning, {
    m, n, k: p.k, batches, transA: a.col !== 1, transB: b.col !== 1,
    halves: isHalf(a.tensor.dtype) || isHalf(b.tensor.dtype),
  });
  const rows4 = kernel === "quad" && m <= 4 && !p.tiles;
  const row_tiles = p.tiles ? p.tiles.shape[0]! : Math.ceil(m / (rows4 ? 4 : TILE[kernel].rows));
  const tiles = row_tiles * Math.ceil(n / TILE[kernel].columns) * batches;
  const splits = splitsOf(p, kernel, tiles);
  const plan = { kernel, rows4, row_tiles, tiles, splits };
  // Halves are written in whole vectors: a pair that two invocations share would be torn.
  const indirect = isHalf(c.tensor.dtype) && (
    splits > 1 || p.accumulate || !inVectors(c, c.row) || n % 4 !== 0);
  const whole = indirect ? device.empty(c.tensor.shape) : c.tensor;
  if (indirect && p.accumulate) convert(c.tensor, whole);
  if (splits === 1) run(p, plan, { ...c, tensor: whole });
  else {
    const parts = device.empty([splits, batches * m, n]);
    run(p, plan, { tensor: parts, row: n, batch: m * n });
    launchSum(parts, splits, batches * m * n, 1, splits, whole, p.accumulate === true);
  }
  if (indirect) convert(whole, c.tensor);
}

interface Plan {
  readonly kernel: ProductKernel;
  readonly rows4: boolean;
  readonly row_tiles: number;
  readonly tiles: number;
  readonly splits: number;
}

/** A long sum with few tiles is cut into parts: c must then be the whole tensor, and nothing else be done. */
function splitsOf(p: Product, kernel: ProductKernel, tiles: number): number {
  const { m, n, k, c, batches = 1 } = p;
  const whole = !c.offset && c.tensor.size === batches * m * n;
  if (p.bias || p.relu2 || p.relu2_of || p.residual || p.tiles || p.offsets || !whole ||
    tiles === 0) return 1;
  const workgroups = tiles / TILE[kernel].per_workgroup;
  return Math.max(1, Math.min(Math.ceil(WANTED[kernel] / workgroups), Math.floor(k / SPLIT_K[kernel]), 16));
}

function run(p: Product, { kernel, rows4, row_tiles, tiles, splits }: Plan, c: Product["c"]): void {
  const { m, n, k, a, b, batches = 1, bias, relu2_of, residual, gather } = p;
  const none = b.tensor; // every binding must hold something
  const options = {
    bind: {
      a: a.tensor, b: b.tensor, c: c.tensor, bias: bias ?? none, tiles: p.tiles ?? p.offsets ?? none,
      table: gather?.table ?? none, extra: relu2_of ?? residual ?? none,
    },
    params: {
      m, n, k, batches, row_tiles, splits, split_k: Math.ceil(k / splits / 4) * 4,
      a_row: a.row, a_col: a.col, a_batch: a.batch ?? 0,
      b_row: b.row, b_col: b.col, b_batch: b.batch ?? 0,
      c_row: c.row, c_batch: c.batch ?? 0, c_split: batches * m * n,
      b_offset: b.offset ?? 0, c_offset: c.offset ?? 0, per: gather?.per ?? 1,
    },
    workgroups: [Math.ceil((tiles * splits) / TILE[kernel].per_workgroup)] as [number],
  };
  const k_tail = k % 4 !== 0 || p.offsets !== undefined;
  const [half_a, half_b, half_c] = [a, b, c].map(({ tensor }) => isHalf(tensor.dtype));
  const shared = conditions({
    a_half: half_a!, b_half: half_b!, c_half: half_c!, a_bf16: a.tensor.dtype === "bf16",
    b_bf16: b.tensor.dtype === "bf16", c_bf16: c.tensor.dtype === "bf16",
    bias: !!bias, relu2: p.relu2 === true, relu2_of: !!relu2_of, residual: !!residual,
    accumulate: p.accumulate === true && splits === 1,
    grouped_rows: p.tiles !== undefined, grouped_k: p.offsets !== undefined,
    gather_a: !!gather && !p.offsets, gather_b: !!gather && !!p.offsets,
    c_vec: n % 4 === 0 && inVectors(c, c.row),
  });
  const a_along_k = a.col === 1;
  const b_along_k = b.row === 1 && b.col !== 1;
  const a_vec_k = a_along_k && !p.offsets && inVectors(a, a.row);
  const b_vec_k = b.row === 1 && !k_tail && inVectors(b, b.col);
  const b_vec_n = b.row !== 1 && b.col === 1 && inVectors(b, b.row);
  if (kernel === "quad") {
    const a_vec_m = !a_along_k && a.row === 1 && !b_vec_k && inVectors(a, a.col);
    const layout = conditions({ a_vec_k, a_vec_m, b_vec_n, b_vec_k, k_tail, rows4 });
    return launch("matmul/matmul_quad", {
      ...options, params: { ...options.params, group: 4, groups: rows4 ? 1 : 4 },
      conditions: ["subgroups", ...shared, ...layout],
    });
  }
  const a_vec = a_along_k ? a_vec_k && !k_tail : a.row === 1 && inVectors(a, a.col);
  const layout = conditions({
    a_along_k, b_along_k, a_vec, b_vec: b_along_k ? b_vec_k : b_vec_n, large: kernel === "tile_large",
  });
  launch("matmul/matmul_tile", { ...options, conditions: [...shared, ...layout] });
}

/** x in another number format; x itself where it has that format. */
export function converted(x: Tensor, dtype: FloatDType): Tensor {
  return x.dtype === dtype ? x : cast(x, dtype);
}

/**
 * The format of a product: what was asked for, or that of both factors where they are the same half, or f32.
 */
export function productDType(a: Tensor, b: Tensor, wanted: FloatDType | undefined): FloatDType {
  return wanted ?? (isHalf(a.dtype) && a.dtype === b.dtype ? a.dtype : "f32");
}

/** Whether all rows (or columns) of a matrix begin at multiples of four elements, to be read in vectors. */
function inVectors({ tensor, batch = 0, offset = 0 }: Omit<Matrix, "row" | "col">, stride: number): boolean {
  return [stride, batch, offset, tensor.size].every((elements) => elements % 4 === 0);
}

function conditions<C extends string>(held: Readonly<Record<C, boolean>>): C[] {
  return (Object.keys(held) as C[]).filter((condition) => held[condition]);
}

/**
 * The kernel for a product of f32 x with so few rows that only reading the weight counts; null for others.
 */
export function vectorKernel(x: Tensor, weight: Tensor, rows: number): VectorKernel | null {
  if (!readsInVectors(x, weight)) return null;
  if (x.device.info.isSoftware) return rows <= 2 ? "matvec_quad" : null;
  return rows <= 4 ? "matvec" : null;
}

/** Whether matvec kernels can read the factors: x is f32, and rows of halves are whole vectors of four. */
export function readsInVectors(x: Tensor, weight: Tensor): boolean {
  return !isHalf(x.dtype) && (!isHalf(weight.dtype) || weight.shape.at(-1)! % 4 === 0);
}

/** What happens to the elements of a product before they are stored, as in `Product`. */
export type Epilogue = Pick<Product, "bias" | "relu2" | "residual">;

/**
 * y = x W^T with an epilogue: x [m, k], weight [n, k]; with `offsets` u32 [experts + 1] a matrix per expert.
 */
export function vectorProduct(
  kernel: VectorKernel, x: Tensor, weight: Tensor, y: Tensor, { bias, relu2 = false, residual }: Epilogue =
    {},
  offsets: Tensor | null = null,
): void {
  const [n, k] = weight.shape.slice(-2) as [number, number];
  const m = y.size / Math.max(n, 1);
  const work = m * Math.ceil(n / 4);
  const whole = isHalf(y.dtype) ? y.device.empty(y.shape) : y;
  launch("matmul/matvec", {
    entry: kernel,
    bind: {
      x, weight, y: whole, bias: bias ?? weight, residual: residual ?? weight, offsets: offsets ?? weight,
    },
    params: { m, n, k, experts: offsets ? weight.shape[0]! : 0 },
    conditions: conditions({
      vec4: k % 4 === 0, bias: !!bias, relu2, residual: !!residual, grouped: offsets !== null,
      w_f16: weight.dtype === "f16", w_bf16: weight.dtype === "bf16",
    }),
    workgroups: [kernel === "matvec" ? work : Math.ceil(work / 16)],
  });
  if (whole !== y) convert(whole, y);
}

/** Cuts the rows of every expert into tiles: u32 [count, 4] of (expert, first row, end row, 0). */
export function groupedTiles(offsets: Tensor, rows: number, tile_rows: number): Tensor {
  const experts = offsets.size - 1;
  const count = Math.min(rows, Math.floor((rows + experts * (tile_rows - 1)) / tile_rows));
  const tiles = offsets.device.empty([count, 4], "u32");
  launch("matmul/grouped_tiles", {
    bind: { offsets, tiles }, params: { experts, tile_rows, count }, workgroups: [Math.ceil(count / WG)],
  });
  return tiles;
}

/** out = sum of the rows of x [rows, cols], in a fixed order; out [cols]. */
export function sumRows(x: Tensor, rows: number, cols: number, out: Tensor): void {
  const length = 64;
  if (rows <= 2 * length) return launchSum(x, rows, cols, 1, rows, out, false);
  const parts = Math.ceil(rows / length);
  const partial = x.device.empty([parts, cols]);
  launchSum(x, rows, cols, parts, length, partial, false);
  launchSum(partial, parts, cols, 1, parts, out, false);
}

function launchSum(
  x: Tensor, rows: number, cols: number, parts: number, length: number, out: Tensor, accumulate: boolean,
): void {
  const vec4 = cols % 4 === 0;
  const width = vec4 ? cols / 4 : cols;
  launch("matmul/sum_rows", {
    bind: { x, out }, params: { rows, cols: width, parts, length },
    conditions: conditions({ vec4, accumulate }), workgroups: [Math.ceil((width * parts) / WG)],
  });
}

/**
 * The gradient of h in squared = max(h, 0)^2, from that of the result or of h itself (`Tensor.relu2Key`), or
 * both; null without either.
 */
export function relu2Gradients(
  dy: Tensor | null | undefined, dh: Tensor | null | undefined, squared: Tensor,
): Tensor | null {
  if (!dy) return dh ?? null;
  const through = relu2Gradient(dy, squared);
  return dh ? add(through, dh) : through;
}

function relu2Gradient(dy: Tensor, squared: Tensor): Tensor {
  const dh = dy.device.empty(dy.shape);
  const EACH = dy.device.info.isSoftware ? 16 : 4;
  launch("matmul/relu2_gradient", {
    bind: { dy, squared: converted(squared, "f32"), dh }, params: { count: dy.size }, constants: { EACH },
    workgroups: [Math.ceil(dy.size / (64 * EACH))],
  });
  return dh;
}
