/** The cases of `krait bench peers`: inputs, the same in every process, and some float64 answers. */
import type { NemotronHConfig } from "../../src/index.ts";
import { fromBlocks, roundedToF16, toBlocks } from "./blocks.ts";
import { DENSE, MOE, expectedLogits, hybridWeights, prompt } from "./hybrid.ts";
import { type Input, random } from "./random.ts";

export type { Input };

export interface Expected {
  readonly indices: readonly number[];
  readonly values: readonly number[];
  /** What the op changed, where the change is what counts. */
  readonly base?: readonly number[];
}

export interface Case {
  readonly name: string;
  /** The op of Krait that answers, where its name is not the case's. */
  readonly krait_op: string;
  /** Fewest (default: 1) and most applications in one round; chained values must stay normal numbers. */
  readonly least?: number;
  readonly most: number;
  /** A larger error than this is a wrong answer. Default: F32_BOUND. */
  readonly bound?: number;
  /** What engines of language models run; cases without one are for engines of single ops. */
  readonly model?: NemotronHConfig;
  inputs(): Record<string, Input>;
  /** Elements of the result of one application. */
  expected(inputs: Record<string, Input>): Expected;
}

const SAMPLES = 64;
export const F32_BOUND = 1e-4;
/** An f16 result is off by up to 5e-4 of itself, whatever it was summed in. */
const F16_BOUND = 1e-3;
/** Leaves room for activations that are rounded to 8 bits before the product, as several engines do. */
const BLOCK_BOUND = 2e-2;
export const EPS = 1e-5;
export const FACTOR = 1.0009765625; // exact in f32, and no power of it within a round leaves f32
export const LEARNING_RATE = 1e-3;
export const SSD = { H: 16, P: 64, N: 128 };
export const ATTENTION = { L: 512, H: 8, D: 64 };
export const CONV = { L: 512, C: 2048, K: 4 };
export const MLP = { B: 256, D: 512, F: 2048 };
/** softplus of it is 1: the time step of every token, so that an op without a time step computes the same. */
export const DT_RAW = Math.log(Math.E - 1);

/** The decay of each SSD head's state per token: log of 0.8 to 0.99. */
export function decays(): Float32Array {
  return Float32Array.from({ length: SSD.H }, (_, h) => Math.log(0.8 + (0.19 * h) / (SSD.H - 1)));
}

/** Spread over all of the output, with odd strides so that every row and column position occurs. */
function places(size: number): number[] {
  return Array.from({ length: SAMPLES }, (_, i) => Math.floor(((i + 0.37) * size) / SAMPLES));
}

function at(size: number, value: (index: number) => number): Expected {
  const indices = places(size);
  return { indices, values: indices.map(value) };
}

function product(M: number, K: number, N: number, name: string, krait_op: string, isF16 = false): Case {
  const rounded = (input: Input) => (isF16 ? { ...input, data: roundedToF16(input.data) } : input);
  return {
    name, krait_op, most: 24, bound: isF16 ? F16_BOUND : F32_BOUND,
    inputs: () => ({ x: rounded(random(1, [M, K], 1)), w: rounded(random(2, [K, N], 1 / Math.sqrt(K))) }),
    expected: ({ x, w }) => at(M * N, (i) => {
      const [row, column] = [Math.floor(i / N), i % N];
      let sum = 0;
      for (let k = 0; k < K; k++) sum += x!.data[row * K + k]! * w!.data[k * N + column]!;
      return sum;
    }),
  };
}

/** One row by a matrix in blocks of 32; `w` is [out, in], already rounded, in whole numbers times a scale. */
function blockMatvec(name: string, bits: 4 | 8): Case {
  const size = 4096;
  return {
    name, krait_op: "linear", most: 24, bound: BLOCK_BOUND,
    inputs: () => ({
      x: random(1, [1, size], 1),
      w: {
        shape: [size, size],
        data: fromBlocks(toBlocks(random(2, [size, size], 1 / Math.sqrt(size)).data, bits)),
      },
    }),
    expected: ({ x, w }) => at(size, (n) => {
      let sum = 0;
      for (let k = 0; k < size; k++) sum += x!.data[k]! * w!.data[n * size + k]!;
      return sum;
    }),
  };
}

const ROWS = { M: 1024, N: 4096 };

const softmax: Case = {
  name: "softmax_1024x4096", krait_op: "softmax", most: 24,
  inputs: () => ({ x: random(3, [ROWS.M, ROWS.N], 1) }),
  expected: ({ x }) => at(ROWS.M * ROWS.N, (i) => {
    const row = x!.data.subarray(i - (i % ROWS.N), i - (i % ROWS.N) + ROWS.N);
    return Math.exp(x!.data[i]!) / row.reduce((sum, value) => sum + Math.exp(value), 0);
  }),
};

const layernorm: Case = {
  name: "layernorm_1024x4096", krait_op: "rms_norm", most: 24,
  inputs: () => {
    const w = random(5, [ROWS.N], 0.1);
    return { x: random(4, [ROWS.M, ROWS.N], 1), w: { ...w, data: w.data.map((value) => 1 + value) } };
  },
  expected: ({ x, w }) => at(ROWS.M * ROWS.N, (i) => {
    const row = x!.data.subarray(i - (i % ROWS.N), i - (i % ROWS.N) + ROWS.N);
    const mean = row.reduce((sum, value) => sum + value * value, 0) / ROWS.N;
    return (x!.data[i]! / Math.sqrt(mean + EPS)) * w!.data[i % ROWS.N]!;
  }),
};

const attention: Case = {
  name: "attention_512x8x64", krait_op: "attention", most: 24,
  inputs: () => {
    const shape = [1, ATTENTION.L, ATTENTION.H, ATTENTION.D];
    return { x: random(6, shape, 1), k: random(7, shape, 1), v: random(8, shape, 1) };
  },
  expected: ({ x, k, v }) => {
    const { L, H, D } = ATTENTION;
    return at(L * H * D, (i) => {
      const [t, h] = [Math.floor(i / (H * D)), Math.floor(i / D) % H];
      let [sum, total] = [0, 0];
      for (let s = 0; s < L; s++) {
        let score = 0;
        for (let d = 0; d < D; d++) {
          score += x!.data[(t * H + h) * D + d]! * k!.data[(s * H + h) * D + d]!;
        }
        const weight = Math.exp(score / Math.sqrt(D));
        total += weight;
        sum += weight * v!.data[(s * H + h) * D + (i % D)]!;
      }
      return sum / total;
    });
  },
};

function scan(name: string, L: number, krait_op: string, most: number): Case {
  const { H, P, N } = SSD;
  return {
    name, krait_op, most,
    inputs: () => ({
      x: random(9, [1, L, H, P], 1), b: random(10, [1, L, 1, N], 1 / Math.sqrt(N)),
      c: random(11, [1, L, 1, N], 1 / Math.sqrt(N)),
      state: random(12, [1, H, P, N], L === 1 ? 1 : 0),
    }),
    expected: ({ x, b, c, state }) => {
      const g = decays();
      return at(L * H * P, (i) => {
        const [t, h, p] = [Math.floor(i / (H * P)), Math.floor(i / P) % H, i % P];
        const decay = Math.exp(g[h]!);
        let y = 0;
        for (let n = 0; n < N; n++) {
          let s = state!.data[(h * P + p) * N + n]!;
          for (let u = 0; u <= t; u++) s = decay * s + x!.data[(u * H + h) * P + p]! * b!.data[u * N + n]!;
          y += s * c!.data[t * N + n]!;
        }
        return y;
      });
    },
  };
}

const conv: Case = {
  name: "conv_silu_512", krait_op: "causal_conv1d", most: 24,
  inputs: () => ({
    x: random(13, [1, CONV.L, CONV.C], 1), w: random(14, [CONV.C, CONV.K], 0.5),
    bias: random(15, [CONV.C], 0.1),
  }),
  expected: ({ x, w, bias }) => at(CONV.L * CONV.C, (i) => {
    const [t, c] = [Math.floor(i / CONV.C), i % CONV.C];
    let sum = bias!.data[c]!;
    for (let j = 0; j < CONV.K; j++) {
      const from = t - CONV.K + 1 + j;
      if (from >= 0) sum += w!.data[c * CONV.K + j]! * x!.data[from * CONV.C + c]!;
    }
    return sum / (1 + Math.exp(-sum));
  }),
};

const mlp: Case = {
  name: "mlp_train", krait_op: "linear, relu2", most: 4,
  inputs: () => ({
    x: random(16, [MLP.B, MLP.D], 1), target: random(17, [MLP.B, MLP.D], 1),
    // Stored as [in, out]; an engine that keeps [out, in] turns them before it starts.
    w1: random(18, [MLP.D, MLP.F], 1 / Math.sqrt(MLP.D)),
    w2: random(19, [MLP.F, MLP.D], 1 / Math.sqrt(MLP.F)),
  }),
  /** The first weight after one step; the loss is sum((y - target)^2) / (2 batch). */
  expected: ({ x, target, w1, w2 }) => {
    const { B, D, F } = MLP;
    const matmul = (a: Float64Array, b: Float32Array, K: number, N: number) => {
      const y = new Float64Array((a.length / K) * N);
      for (let m = 0; m < a.length / K; m++) {
        for (let k = 0; k < K; k++) {
          const s = a[m * K + k]!;
          if (s !== 0) for (let n = 0; n < N; n++) y[m * N + n]! += s * b[k * N + n]!;
        }
      }
      return y;
    };
    const before = matmul(Float64Array.from(x!.data), w1!.data, D, F);
    const y = matmul(before.map((value) => Math.max(value, 0) ** 2), w2!.data, F, D);
    const dy = y.map((value, i) => (value - target!.data[i]!) / B);
    const step = at(D * F, (i) => {
      const [d, f] = [Math.floor(i / F), i % F];
      let gradient = 0;
      for (let m = 0; m < B; m++) {
        let dh = 0;
        for (let o = 0; o < D; o++) dh += dy[m * D + o]! * w2!.data[f * D + o]!;
        gradient += x!.data[m * D + d]! * dh * 2 * Math.max(before[m * F + f]!, 0);
      }
      return w1!.data[i]! - LEARNING_RATE * gradient;
    });
    return { ...step, base: step.indices.map((i) => w1!.data[i]!) };
  },
};

const COPY_SIZE = 1 << 24;
const copy: Case = {
  name: "copy_16m", krait_op: "scale", most: 24,
  inputs: () => ({ x: random(20, [COPY_SIZE / 4096, 4096], 1) }),
  expected: ({ x }) => at(COPY_SIZE, (i) => x!.data[i]! * FACTOR),
};

export const LLM = { prompt: 512, context: 16, check: 12 };

/** A prompt of 512 tokens up to the first new token, or one new token after a short prompt. */
function languageModel(name: string, config: NemotronHConfig): Case {
  const isPrefill = name.endsWith("prefill");
  return {
    name, krait_op: "Generator", least: isPrefill ? 1 : 32, most: isPrefill ? 4 : 128, bound: BLOCK_BOUND,
    model: config,
    inputs: () => hybridWeights(config),
    /** Logits after a prompt of LLM.check tokens, less their mean. */
    expected: (weights) => {
      const logits = expectedLogits(config, weights, prompt(LLM.check));
      return at(logits.length, (i) => logits[i]!);
    },
  };
}

export const CASES: readonly Case[] = [
  ...[512, 1024].map((n) => product(n, n, n, `matmul_f32_${n}`, "matmul")),
  ...[512, 1024].map((n) => product(n, n, n, `matmul_f16_${n}`, "matmul", true)),
  product(1, 4096, 4096, "matvec_f32_4096", "linear"),
  blockMatvec("matvec_q4_4096", 4), blockMatvec("matvec_q8_4096", 8), softmax, layernorm, attention,
  scan("ssd_512", 512, "ssd_scan", 16), scan("ssd_step", 1, "selective_state_update", 200), conv, mlp,
  languageModel("llm_prefill", DENSE), languageModel("llm_decode", DENSE), copy,
  // The same with a mixture of experts.
  languageModel("llm_moe_prefill", MOE), languageModel("llm_moe_decode", MOE),
];

/** Rows and columns of a matrix exchanged. */
export function transposed({ shape, data }: Input): Input {
  const [rows, cols] = shape as [number, number];
  const turned = new Float32Array(data.length);
  for (let r = 0; r < rows; r++) for (let c = 0; c < cols; c++) turned[c * rows + r] = data[r * cols + c]!;
  return { shape: [cols, rows], data: turned };
}
