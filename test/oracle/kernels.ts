/**
 * A second definition of the gather-like ops, independent of `src/reference`: kernels of gpu.js, one element
 * per call, run in its "cpu" mode (arithmetic in double, results rounded to float32). gpu.js translates the
 * text of each function, which therefore can use its arguments and constants alone.
 */
import { GPU, type IKernelFunctionThis } from "gpu.js";
import { type NdArray, ndarray, sizeOf } from "../../src/tensor/ndarray.ts";

type Sizes = Readonly<Record<string, number>>;
type Flat = readonly number[];
/** Computes element `this.thread.x` of the output. */
type Gather = (this: IKernelFunctionThis<Sizes>, ...inputs: never[]) => number;

const gpu = new GPU({ mode: "cpu" });

/** Runs a kernel for every element of an output. */
function gather(shape: readonly number[], constants: Sizes, kernel: Gather, ...inputs: NdArray[]): NdArray {
  const settings = { output: [sizeOf(shape)], constants: { ...constants } };
  const run = gpu.createKernel(kernel as never, settings) as unknown as
    ((...arrays: Float32Array[]) => ArrayLike<number>) & { destroy(): void };
  const values = ndarray(shape, run(...inputs.map(({ data }) => Float32Array.from(data))));
  run.destroy();
  return values;
}

/** op(a) op(b) of matrices. */
export function matmul(a: NdArray, b: NdArray, { transA = false, transB = false } = {}): NdArray {
  const [M, K] = (transA ? [a.shape[1], a.shape[0]] : a.shape) as [number, number];
  const N = transB ? b.shape[0]! : b.shape[1]!;
  const sizes = { M, K, N, transA: Number(transA), transB: Number(transB) };
  return gather([M, N], sizes, function (x: Flat, y: Flat) {
    const N = this.constants.N!;
    const K = this.constants.K!;
    const transA = this.constants.transA!;
    const M = this.constants.M!;
    const transB = this.constants.transB!;
    const m = Math.floor(this.thread.x / N);
    const n = this.thread.x % N;
    let sum = 0;
    for (let k = 0; k < K; k++) {
      sum += x[transA * (k * M + m) + (1 - transA) * (m * K + k)]! *
        y[transB * (n * K + k) + (1 - transB) * (k * N + n)]!;
    }
    return sum;
  }, a, b);
}

export function relu2(x: NdArray): NdArray {
  return gather(x.shape, {}, function (values: Flat) {
    return Math.pow(Math.max(values[this.thread.x]!, 0), 2);
  }, x);
}

export function embedding(ids: NdArray, weight: NdArray): NdArray {
  const D = weight.shape[1]!;
  return gather([...ids.shape, D], { D }, function (token: Flat, table: Flat) {
    const t = Math.floor(this.thread.x / this.constants.D!);
    return table[token[t]! * this.constants.D! + this.thread.x % this.constants.D!]!;
  }, ids, weight);
}

export function rms_norm(x: NdArray, weight: NdArray, eps: number): NdArray {
  return gather(x.shape, { D: weight.shape[0]!, eps }, function (values: Flat, scale: Flat) {
    const D = this.constants.D!;
    const first = Math.floor(this.thread.x / D) * D;
    let squares = 0;
    for (let i = 0; i < D; i++) squares += values[first + i]! * values[first + i]!;
    return values[this.thread.x]! / Math.sqrt(squares / D + this.constants.eps!) * scale[this.thread.x % D]!;
  }, x, weight);
}

export function gated_rms_norm(
  y: NdArray, z: NdArray, weight: NdArray, ngroups: number, eps: number,
): NdArray {
  const I = weight.shape[0]!;
  return gather(y.shape, { I, width: I / ngroups, eps }, function (values: Flat, gate: Flat, scale: Flat) {
    const width = this.constants.width!;
    const first = Math.floor(this.thread.x / width) * width;
    let squares = 0;
    let mine = 0;
    for (let i = first; i < first + width; i++) {
      const gated = values[i]! * gate[i]! / (1 + Math.exp(-gate[i]!));
      squares += gated * gated;
      if (i === this.thread.x) mine = gated;
    }
    const factor = scale[this.thread.x % this.constants.I!]!;
    return mine / Math.sqrt(squares / width + this.constants.eps!) * factor;
  }, y, z, weight);
}

/** Causal, the keys being those of the queries' own positions and of earlier ones. */
export function attention(q: NdArray, k: NdArray, v: NdArray, { scale }: { scale: number }): NdArray {
  const [, L, H, Dh] = q.shape as [number, number, number, number];
  const [, Lk, G] = k.shape as [number, number, number, number];
  return gather(q.shape, { L, Lk, H, G, Dh, scale }, function (query: Flat, key: Flat, value: Flat) {
    const Dh = this.constants.Dh!;
    const H = this.constants.H!;
    const L = this.constants.L!;
    const G = this.constants.G!;
    const Lk = this.constants.Lk!;
    const scale = this.constants.scale!;
    const row = Math.floor(this.thread.x / Dh); // (b L + t) H + h
    const t = Math.floor(row / H) % L;
    const b = Math.floor(row / H / L);
    const g = Math.floor(row % H / (H / G));
    let weights = 0;
    let sum = 0;
    for (let j = 0; j <= t + Lk - L; j++) {
      const at = ((b * Lk + j) * G + g) * Dh;
      let score = 0;
      for (let d = 0; d < Dh; d++) score += query[row * Dh + d]! * key[at + d]!;
      const weight = Math.exp(score * scale); // scores of the samples are small: no shift is needed in double
      weights += weight;
      sum += weight * value[at + this.thread.x % Dh]!;
    }
    return sum / weights;
  }, q, k, v);
}

/** silu(conv), with zeros before the first position. */
export function causal_conv1d(xBC: NdArray, weight: NdArray, bias: NdArray): NdArray {
  const [, L, C] = xBC.shape as [number, number, number];
  return gather(xBC.shape, { L, C, W: weight.shape[1]! }, function (values: Flat, taps: Flat, offset: Flat) {
    const C = this.constants.C!;
    const L = this.constants.L!;
    const W = this.constants.W!;
    const channel = this.thread.x % C;
    const t = Math.floor(this.thread.x / C) % L;
    let sum = offset[channel]!;
    for (let i = 0; i < W; i++) {
      const back = W - 1 - i;
      if (t >= back) sum += taps[channel * W + i]! * values[this.thread.x - back * C]!;
    }
    return sum / (1 + Math.exp(-sum));
  }, xBC, weight, bias);
}

/** dt = clamp(softplus(dt_raw + dt_bias)), by chunk: [B, H, nC, Q]; 0 past the end of the row. */
export function time_steps(
  dt_raw: NdArray, dt_bias: NdArray, Q: number, [lo, hi]: readonly [number, number],
): NdArray {
  const [B, L, H] = dt_raw.shape as [number, number, number];
  const nC = Math.ceil(L / Q);
  const sizes = { L, H, span: nC * Q, lo, hi: Math.min(hi, 1e30) };
  return gather([B, H, nC, Q], sizes, function (raw: Flat, bias: Flat) {
    const span = this.constants.span!;
    const H = this.constants.H!;
    const L = this.constants.L!;
    const lo = this.constants.lo!;
    const hi = this.constants.hi!;
    const t = this.thread.x % span;
    const row = Math.floor(this.thread.x / span); // b H + h
    const at = (Math.floor(row / H) * L + t) * H + row % H;
    if (t >= L) return 0;
    return Math.min(Math.max(Math.log(1 + Math.exp(raw[at]! + bias[row % H]!)), lo), hi);
  }, dt_raw, dt_bias);
}

/** Running sum of -exp(A_log) dt within each chunk. */
export function decay_sums(dt: NdArray, A_log: NdArray): NdArray {
  const [, H, nC, Q] = dt.shape as [number, number, number, number];
  return gather(dt.shape, { H, nC, Q }, function (step: Flat, log: Flat) {
    const nC = this.constants.nC!;
    const Q = this.constants.Q!;
    const H = this.constants.H!;
    const head = Math.floor(this.thread.x / (nC * Q)) % H;
    let steps = 0;
    for (let i = this.thread.x - this.thread.x % Q; i <= this.thread.x; i++) steps += step[i]!;
    return -Math.exp(log[head]!) * steps;
  }, dt, A_log);
}

/** What each chunk adds to the state: [B, nC, H, P, N]. */
export function chunk_state(Bm: NdArray, x: NdArray, dt: NdArray, dA_cumsum: NdArray): NdArray {
  const [B, L, G, N] = Bm.shape as [number, number, number, number];
  const [H, P] = x.shape.slice(2) as [number, number];
  const [nC, Q] = dt.shape.slice(2) as [number, number];
  const sizes = { L, G, N, H, P, nC, Q };
  return gather([B, nC, H, P, N], sizes, function (keys: Flat, values: Flat, step: Flat, sums: Flat) {
    const N = this.constants.N!;
    const P = this.constants.P!;
    const H = this.constants.H!;
    const nC = this.constants.nC!;
    const Q = this.constants.Q!;
    const L = this.constants.L!;
    const G = this.constants.G!;
    const n = this.thread.x % N;
    const p = Math.floor(this.thread.x / N) % P;
    const h = Math.floor(this.thread.x / (N * P)) % H;
    const chunk = Math.floor(this.thread.x / (N * P * H)) % nC;
    const b = Math.floor(this.thread.x / (N * P * H * nC));
    const first = ((b * H + h) * nC + chunk) * Q;
    let sum = 0;
    for (let i = 0; i < Q; i++) {
      const t = chunk * Q + i;
      if (t < L) {
        sum += Math.exp(sums[first + Q - 1]! - sums[first + i]!) * step[first + i]! *
          values[((b * L + t) * H + h) * P + p]! *
          keys[((b * L + t) * G + Math.floor(h / (H / G))) * N + n]!;
      }
    }
    return sum;
  }, Bm, x, dt, dA_cumsum);
}

/** The scan as a matrix: y_t = D x_t + sum_{s <= t} exp(A (dt_{s+1} + ... + dt_t)) dt_s <C_t, B_s> x_s. */
export function ssd_scan(
  x: NdArray, dt: NdArray, A_log: NdArray, Bm: NdArray, Cm: NdArray, D: NdArray,
): NdArray {
  const [, L, H, P] = x.shape as [number, number, number, number];
  const [G, N] = Bm.shape.slice(2) as [number, number];
  const sizes = { L, H, P, G, N, span: dt.shape[2]! * dt.shape[3]! };
  const kernel: Gather = function (
    values: Flat, step: Flat, log: Flat, keys: Flat, queries: Flat, skip: Flat,
  ) {
    const P = this.constants.P!;
    const H = this.constants.H!;
    const L = this.constants.L!;
    const G = this.constants.G!;
    const span = this.constants.span!;
    const N = this.constants.N!;
    const p = this.thread.x % P;
    const h = Math.floor(this.thread.x / P) % H;
    const t = Math.floor(this.thread.x / (P * H)) % L;
    const b = Math.floor(this.thread.x / (P * H * L));
    const g = Math.floor(h / (H / G));
    const steps = (b * H + h) * span;
    let sum = skip[h]! * values[this.thread.x]!;
    let exponent = 0;
    for (let s = t; s >= 0; s--) {
      let product = 0;
      for (let n = 0; n < N; n++) {
        product += queries[((b * L + t) * G + g) * N + n]! * keys[((b * L + s) * G + g) * N + n]!;
      }
      sum += Math.exp(exponent) * step[steps + s]! * product * values[((b * L + s) * H + h) * P + p]!;
      exponent -= step[steps + s]! * Math.exp(log[h]!);
    }
    return sum;
  };
  return gather(x.shape, sizes, kernel, x, dt, A_log, Bm, Cm, D);
}

/** The weight of every expert: 0 unless it is among the `topk` best of all. [T, E] */
export function router(
  logits: NdArray, bias: NdArray, { topk, scaling }: { topk: number; scaling: number },
): NdArray {
  const sizes = { E: logits.shape[1]!, topk, scaling };
  return gather(logits.shape, sizes, function (values: Flat, correction: Flat) {
    const E = this.constants.E!;
    const topk = this.constants.topk!;
    const scaling = this.constants.scaling!;
    const mine = this.thread.x % E;
    const first = this.thread.x - mine;
    let weight = 0;
    let sum = 0;
    for (let e = 0; e < E; e++) {
      const score = 1 / (1 + Math.exp(-values[first + e]!));
      let better = 0;
      for (let f = 0; f < E; f++) {
        const difference = 1 / (1 + Math.exp(-values[first + f]!)) + correction[f]! - score - correction[e]!;
        if (difference > 0 || (difference === 0 && f < e)) better += 1;
      }
      if (better < topk) {
        sum += score;
        if (e === mine) weight = score;
      }
    }
    return scaling * weight / sum;
  }, logits, bias);
}
