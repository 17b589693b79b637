/** The matrix products that ops are made of: the choice of a kernel and its layout. Not an op itself. */
import { launch } from "../kernel/launch.ts";
import { bucket, choose, defineTunable } from "../kernel/tuner.ts";
import type { Device } from "../tensor/device.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { randomTensor, trial } from "../tensor/trial.ts";

/**
 * Kernels for a product: `quad` keeps 16 x 16 tiles in the registers of four invocations (software adapters),
 * `tile` stages 64 x 64 tiles in workgroup memory (GPUs, and wherever there are no subgroups).
 */
export type ProductKernel = "quad" | "tile";
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

/** c = a b: a [m, k], b [k, n], c [m, n] with neighbouring columns, `batches` times. */
export interface Product {
  readonly m: number;
  readonly n: number;
  readonly k: number;
  readonly batches?: number;
  readonly a: Omit<Matrix, "offset">;
  readonly b: Matrix;
  readonly c: Omit<Matrix, "col">;
  /** [n], added to every row. */
  readonly bias?: Tensor | null;
  /** c += a b instead of c = a b. */
  readonly accumulate?: boolean;
  /** Row tiles from `groupedTiles`: each names its rows and the matrix of b. */
  readonly tiles?: Tensor;
  /** u32 [batches + 1]: matrix e of c sums over k in offsets[e] .. offsets[e + 1]. */
  readonly offsets?: Tensor;
  readonly kernel?: ProductKernel | undefined;
}

const TILE = {
  quad: { rows: 16, columns: 16, per_workgroup: 8 },
  tile: { rows: 64, columns: 64, per_workgroup: 1 },
} as const;
/** A sum over k is split where there are fewer workgroups, but not into parts shorter than SPLIT_K. */
const WANTED = { quad: 4, tile: 128 } as const;
const SPLIT_K = 128;
const WG = 32; // of sum_rows and grouped_tiles

/** What the choice of a product's kernel depends on; `trans` as in matmul. */
type ProductShape = {
  readonly m: number; readonly n: number; readonly k: number; readonly batches: number;
  readonly transA: boolean; readonly transB: boolean;
};

/** `quad` or `tile` for a product without groups. */
const productTuning = defineTunable({
  name: "matmul/product",
  classOf: (shape: ProductShape) => ({
    ...shape, m: bucket(shape.m), n: bucket(shape.n), k: bucket(shape.k), batches: bucket(shape.batches, 64),
  }),
  candidates: (device: Device): ProductKernel[] => device.hasSubgroups ? ["quad", "tile"] : ["tile"],
  fallback: (device) => device.hasSubgroups && device.info.isSoftware ? "quad" : "tile",
  trial: (device, { m, n, k, batches, transA, transB }) => trial(() => ({
    a: randomTensor(device, [batches, m, k], 0, k ** -0.5), b: randomTensor(device, [batches, k, n], 1),
  }), ({ a, b }, kernel: ProductKernel) => {
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

/** The kernel for products on the tensor's device: the wanted one, or the one that suits the adapter. */
export function productKernel({ device }: Tensor, wanted?: string): ProductKernel {
  if (wanted === "tile" || !device.hasSubgroups) return "tile";
  return wanted === "quad" || device.info.isSoftware ? "quad" : "tile";
}

/** Rows per tile of a grouped product. */
export function tileRows(kernel: ProductKernel): number {
  return TILE[kernel].rows;
}

/** Records a product. */
export function product(p: Product): void {
  const { m, n, c, batches = 1 } = p;
  const kernel = p.kernel ? productKernel(c.tensor, p.kernel) : choose(c.tensor.device, productTuning, {
    m, n, k: p.k, batches, transA: p.a.col !== 1, transB: p.b.col !== 1,
  });
  const rows4 = kernel === "quad" && m <= 4 && !p.tiles;
  const row_tiles = p.tiles ? p.tiles.shape[0]! : Math.ceil(m / (rows4 ? 4 : TILE[kernel].rows));
  const tiles = row_tiles * Math.ceil(n / TILE[kernel].columns) * batches;
  const splits = splitsOf(p, kernel, tiles);
  const plan = { kernel, rows4, row_tiles, tiles, splits };
  if (splits === 1) return run(p, plan, c);
  const parts = c.tensor.device.empty([splits, batches * m, n]);
  run(p, plan, { tensor: parts, row: n, batch: m * n });
  launchSum(parts, splits, batches * m * n, 1, splits, c.tensor, p.accumulate === true);
}

interface Plan {
  readonly kernel: ProductKernel;
  readonly rows4: boolean;
  readonly row_tiles: number;
  readonly tiles: number;
  readonly splits: number;
}

/** A long sum with few tiles is cut into parts: c must then be the whole tensor. */
function splitsOf(p: Product, kernel: ProductKernel, tiles: number): number {
  const { m, n, k, c, batches = 1 } = p;
  const whole = !c.offset && c.tensor.size === batches * m * n;
  if (p.bias || p.tiles || p.offsets || !whole || tiles === 0) return 1;
  const workgroups = tiles / TILE[kernel].per_workgroup;
  return Math.max(1, Math.min(Math.ceil(WANTED[kernel] / workgroups), Math.floor(k / SPLIT_K), 16));
}

function run(p: Product, { kernel, rows4, row_tiles, tiles, splits }: Plan, c: Product["c"]): void {
  const { m, n, k, a, b, batches = 1, bias = null } = p;
  const grouped = p.tiles ?? p.offsets ?? b.tensor; // without groups b: every binding must hold something
  const options = {
    bind: { a: a.tensor, b: b.tensor, c: c.tensor, bias: bias ?? b.tensor, tiles: grouped },
    params: {
      m, n, k, batches, row_tiles, splits, split_k: Math.ceil(k / splits / 4) * 4,
      a_row: a.row, a_col: a.col, a_batch: a.batch ?? 0,
      b_row: b.row, b_col: b.col, b_batch: b.batch ?? 0,
      c_row: c.row, c_batch: c.batch ?? 0, c_split: batches * m * n,
      b_offset: b.offset ?? 0, c_offset: c.offset ?? 0,
    },
    workgroups: [Math.ceil((tiles * splits) / TILE[kernel].per_workgroup)] as [number],
  };
  const shared = conditions({
    bias: bias !== null, accumulate: p.accumulate === true && splits === 1,
    grouped_rows: p.tiles !== undefined, grouped_k: p.offsets !== undefined,
  });
  if (kernel === "tile") return launch("matmul/matmul_tile", { ...options, conditions: shared });
  const k_tail = k % 4 !== 0 || p.offsets !== undefined;
  const b_vec_k = b.row === 1 && !k_tail && inVectors(b, b.col);
  const layout = conditions({
    a_vec_k: a.col === 1 && !p.offsets && inVectors(a, a.row),
    a_vec_m: a.col !== 1 && a.row === 1 && !b_vec_k && inVectors(a, a.col),
    b_vec_n: b.row !== 1 && b.col === 1 && inVectors(b, b.row),
    b_vec_k, c_vec: inVectors(c, c.row),
    k_tail, rows4,
  });
  launch("matmul/matmul_quad", {
    ...options, params: { ...options.params, group: 4 }, conditions: ["subgroups", ...shared, ...layout],
  });
}

/** Whether all rows (or columns) of a matrix begin at multiples of four elements, to be read in vectors. */
function inVectors({ tensor, batch = 0, offset = 0 }: Omit<Matrix, "row" | "col">, stride: number): boolean {
  return [stride, batch, offset, tensor.size].every((elements) => elements % 4 === 0);
}

function conditions<C extends string>(held: Readonly<Record<C, boolean>>): C[] {
  return (Object.keys(held) as C[]).filter((condition) => held[condition]);
}

/** The kernel for a product with so few rows that only reading the weight counts; null for more rows. */
export function vectorKernel({ device }: Tensor, rows: number): VectorKernel | null {
  if (device.info.isSoftware) return rows <= 2 ? "matvec_quad" : null;
  return rows <= 4 ? "matvec" : null;
}

/** y = x W^T (+ bias): x [m, k], weight [n, k]; with `offsets` u32 [experts + 1] one matrix per expert. */
export function vectorProduct(
  kernel: VectorKernel, x: Tensor, weight: Tensor, bias: Tensor | null, y: Tensor,
  offsets: Tensor | null = null,
): void {
  const [n, k] = weight.shape.slice(-2) as [number, number];
  const m = y.size / Math.max(n, 1);
  const work = m * Math.ceil(n / 4);
  launch("matmul/matvec", {
    entry: kernel,
    bind: { x, weight, y, bias: bias ?? weight, offsets: offsets ?? weight },
    params: { m, n, k, experts: offsets ? weight.shape[0]! : 0 },
    conditions: conditions({ vec4: k % 4 === 0, bias: bias !== null, grouped: offsets !== null }),
    workgroups: [kernel === "matvec" ? work : Math.ceil(work / 16)],
  });
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
