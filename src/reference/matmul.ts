import { ndarray, type NdArray } from "../tensor/ndarray.ts";

/** Which factors of a matrix product are read transposed. */
interface Transposes {
  readonly transA?: boolean;
  readonly transB?: boolean;
}

interface Walk {
  readonly batch: number;
  readonly M: number;
  readonly N: number;
  readonly K: number;
  readonly shape: readonly number[];
  /** Element numbers of A[z, m, k] and B[z, k, n]. */
  readonly a: (z: number, m: number, k: number) => number;
  readonly b: (z: number, k: number, n: number) => number;
}

function walk(a: NdArray, b: NdArray, { transA = false, transB = false }: Transposes): Walk {
  const lead = a.shape.slice(0, -2);
  const [M, K] = [a.shape.at(transA ? -1 : -2)!, a.shape.at(transA ? -2 : -1)!];
  const N = b.shape.at(transB ? -2 : -1)!;
  const step = b.shape.length === 2 ? 0 : K * N;
  return {
    batch: lead.reduce((x, y) => x * y, 1), M, N, K, shape: [...lead, M, N],
    a: (z, m, k) => z * M * K + (transA ? k * M + m : m * K + k),
    b: (z, k, n) => z * step + (transB ? n * K + k : k * N + n),
  };
}

/** C = op(A) op(B) for every leading index, op as asked. A [..., M, K], B [..., K, N] or [K, N]. */
export function matmul(a: NdArray, b: NdArray, options: Transposes = {}): NdArray {
  const w = walk(a, b, options);
  const c = ndarray(w.shape);
  for (let z = 0, at = 0; z < w.batch; z++) {
    for (let m = 0; m < w.M; m++) {
      for (let n = 0; n < w.N; n++, at++) {
        for (let k = 0; k < w.K; k++) c.data[at]! += a.data[w.a(z, m, k)]! * b.data[w.b(z, k, n)]!;
      }
    }
  }
  return c;
}

/** dop(A) = dC op(B)^T, dop(B) = op(A)^T dC; a shared B collects the gradients of all matrices. */
export function matmul_vjp(
  [dc]: readonly (NdArray | null)[], a: NdArray, b: NdArray, options: Transposes = {},
): (NdArray | null)[] {
  const w = walk(a, b, options);
  const [da, db] = [ndarray(a.shape), ndarray(b.shape)];
  if (!dc) return [da, db, null];
  for (let z = 0, at = 0; z < w.batch; z++) {
    for (let m = 0; m < w.M; m++) {
      for (let n = 0; n < w.N; n++, at++) {
        for (let k = 0; k < w.K; k++) {
          da.data[w.a(z, m, k)]! += dc.data[at]! * b.data[w.b(z, k, n)]!;
          db.data[w.b(z, k, n)]! += dc.data[at]! * a.data[w.a(z, m, k)]!;
        }
      }
    }
  }
  return [da, db, null];
}
