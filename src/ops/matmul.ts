import { check } from "../tensor/check.ts";
import { sizeOf } from "../tensor/ndarray.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { type FloatDType, type Matrix, product, productDType } from "./gemm.ts";
import { isVectorKernel, type VectorKernel, vectorKernel, vectorProduct } from "./matvec.ts";
import { defineOp, type Op } from "./op.ts";
import type { ProductKernel } from "./product_kernels.ts";
import { sumRows } from "./sum_rows.ts";

export interface MatmulOptions {
  /** a is stored [..., K, M]. */
  readonly transA?: boolean;
  /** b is stored [..., N, K]. */
  readonly transB?: boolean;
  /** Which kernel computes it; default: the one that suits the adapter and the shape. */
  readonly kernel?: ProductKernel | VectorKernel;
  /** Number format of the result; default: that of a and b where both are the same half, or f32. */
  readonly out?: FloatDType;
}

/**
 * C = op(A) op(B) for every leading index, where op transposes the last two dimensions if asked.
 *
 * a and b may be f32, f16 or bf16; sums are f32, and so are the gradients. The `quad` kernel serves software
 * adapters, `tile` GPUs; very few rows with `transB` take a `matvec`.
 *
 * @param a  [..., M, K], or [..., K, M] with `transA`
 * @param b  [..., K, N] with the same leading extents, or one matrix [K, N] for all of them; [N, K] with
 *   `transB`
 * @returns [..., M, N]
 * @throws ShapeError when the inner or the leading extents differ
 */
export const matmul: Op<[a: Tensor, b: Tensor, options?: MatmulOptions], Tensor> = defineOp({
  name: "matmul",
  halves: [0, 1],
  forward(ctx, a: Tensor, b: Tensor, options: MatmulOptions = {}): Tensor {
    const { transA = false, transB = false, kernel } = options;
    check(a.shape.length >= 2, "matmul", "a", "[..., M, K]", a);
    check(b.shape.length >= 2, "matmul", "b", "[..., K, N]", b);
    const lead = a.shape.slice(0, -2);
    const [M, K] = [a.shape.at(transA ? -1 : -2)!, a.shape.at(transA ? -2 : -1)!];
    const N = b.shape.at(transB ? -2 : -1)!;
    const inner = transB ? `N, ${K}` : `${K}, N`;
    check(b.shape.at(transB ? -1 : -2) === K, "matmul", "b", `[..., ${inner}]`, b);
    const shared = b.shape.length === 2;
    const batched = `[${[...lead, inner].join(", ")}]`;
    check(shared || b.shape.slice(0, -2).join() === lead.join(), "matmul", "b", batched, b);

    const c = a.device.empty([...lead, M, N], productDType(a, b, options.out));
    ctx.save({ a, b, options });
    const fold = shared && !transA; // one tall matrix instead of a batch
    const count = sizeOf(lead);
    const [batches, m] = fold ? [1, count * M] : [count, M];
    const chosen = kernel ?? (fold && transB ? vectorKernel(a, b, m) : null);
    if (isVectorKernel(chosen)) {
      check(fold && transB, "matmul", "b", "one matrix [N, K] with transB for a matvec kernel", b);
      vectorProduct(chosen, a, b, c);
    } else {
      product({
        m, n: N, k: K, batches, a: matrix(a, M, K, transA),
        b: { ...matrix(b, K, N, transB), batch: shared ? 0 : K * N },
        c: { tensor: c, row: N, batch: M * N }, kernel: chosen ?? undefined,
      });
    }
    return c;
  },
  backward({ a, b, options }: { a: Tensor; b: Tensor; options: MatmulOptions }, [dc], needs) {
    if (!dc) return [];
    const { transA = false, transB = false } = options;
    const kernel = options.kernel && !isVectorKernel(options.kernel) ? { kernel: options.kernel } : {};
    const by = (transposes: MatmulOptions): MatmulOptions => ({ ...transposes, ...kernel, out: "f32" });
    const summed = b.shape.length === 2 && a.shape.length > 2; // one B collects the gradients of a batch
    let da: Tensor | null = null;
    if (needs[0]) {
      if (!transA) da = matmul(dc, b, by({ transB: !transB }));
      else if (summed) da = timesTransposed(b, dc, a.shape, transB);
      else da = matmul(b, dc, by({ transA: transB, transB: true }));
    }
    let db: Tensor | null = null;
    if (needs[1]) {
      const [x, y] = summed && !transA ? [flat(a), flat(dc)] : [a, dc];
      const each = transB
        ? matmul(y, x, by({ transA: true, transB: transA }))
        : matmul(x, y, by({ transA: !transA }));
      db = each;
      if (summed && transA) {
        db = b.device.empty(b.shape);
        sumRows(each, sizeOf(a.shape.slice(0, -2)), b.size, db);
      }
    }
    return [da, db];
  },
});

/** da [..., K, M] = op(B) dC^T for one matrix B shared by a batch. */
function timesTransposed(b: Tensor, dc: Tensor, shape: readonly number[], transB: boolean): Tensor {
  const [K, M, N] = [shape.at(-2)!, shape.at(-1)!, dc.shape.at(-1)!];
  const da = dc.device.empty(shape);
  product({
    m: K, n: M, k: N, batches: sizeOf(shape.slice(0, -2)), a: { ...matrix(b, K, N, transB), batch: 0 },
    b: matrix(dc, N, M, true), c: { tensor: da, row: M, batch: K * M },
  });
  return da;
}

const flat = (x: Tensor): Tensor => x.reshape([sizeOf(x.shape.slice(0, -1)), x.shape.at(-1)!]);

/** The matrix [rows, cols] of every batch element, stored plain or transposed. */
function matrix(tensor: Tensor, rows: number, cols: number, transposed: boolean): Matrix {
  const [row, col] = transposed ? [1, rows] : [cols, 1];
  return { tensor, row, col, batch: rows * cols };
}
