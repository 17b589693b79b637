import {
  type BlockTensor, type Device, evaluateIncremental, Generator, NemotronH, type NemotronHConfig, ops, scope,
    Tape,
  type Tensor, type TensorDType,
} from "../../src/index.ts";
import {
  type Case, type Input, ATTENTION, CASES, DT_RAW, EPS, FACTOR, LEARNING_RATE, LLM, MLP, SSD, decays,
  transposed,
} from "./cases.ts";
import { centred, isMatrix, prompt } from "./hybrid.ts";
import type { Engine, Prepared } from "./runner.ts";

const {
  accumulate, add, attention, causal_conv1d, dequantize, linear, matmul, quantize, relu2, rms_norm, scale,
  selective_state_update, softmax, ssd_scan,
} = ops;

/** One application: the next link of the chain. The inputs it changes are put back by `reset`. */
interface Chain {
  readonly start: Tensor;
  step(x: Tensor): Tensor;
  /** What is sampled after one application; default: what `step` returned. */
  readonly watched?: Tensor;
  /** Where the watched tensor keeps the element that the case numbers i; default: i. */
  place?(i: number): number;
  reset?(): void;
  readonly note?: string;
  readonly rounded?: NonNullable<Prepared["rounded"]>;
  dispose?(): void;
}

type Inputs = Record<string, Input>;
type Weight = Tensor | BlockTensor;

export function kraitEngine(device: Device): Engine {
  return {
    version: "",
    async prepare(wanted) {
      if (wanted.model) return preparedModel(device, wanted, wanted.model);
      const made: Tensor[] = [];
      const put = ({ data, shape }: Input, dtype: TensorDType = "f32") => {
        const tensor = device.tensor(data, shape, dtype);
        made.push(tensor);
        return tensor;
      };
      const chain = build(wanted, wanted.inputs(), put);
      return prepared(device, chain, () => {
        chain.dispose?.();
        for (const tensor of made) tensor.dispose();
      });
    },
  };
}

function prepared(device: Device, chain: Chain, dispose: () => void): Prepared {
  const apply = (n: number): Tensor => {
    let x = chain.start;
    for (let i = 0; i < n; i++) {
      const next = scope(() => chain.step(x));
      if (x !== chain.start && next !== x) x.dispose();
      x = next;
    }
    return x;
  };
  return {
    note: chain.note ?? "", ...(chain.rounded ? { rounded: chain.rounded } : {}),
    async run(n) {
      chain.reset?.();
      await device.finish();
      const start = performance.now();
      const x = apply(n);
      await device.finish();
      const ms = (performance.now() - start) / n;
      if (x !== chain.start) x.dispose();
      return ms;
    },
    async sample(indices) {
      chain.reset?.();
      const x = apply(1);
      const data = await (chain.watched ?? x).read();
      if (x !== chain.start) x.dispose();
      return indices.map((i) => data[chain.place?.(i) ?? i]!);
    },
    dispose,
  };
}

/** Generation by the public API, with the same weights as the others. */
function preparedModel(device: Device, wanted: Case, config: NemotronHConfig): Prepared {
  const model = new NemotronH(config, new Map(
    Object.entries(wanted.inputs()).map(([name, { data, shape }]): [string, Weight] => {
    const tensor = device.tensor(data, shape);
    if (!isMatrix(name)) return [name, tensor];
    const blocks = quantize(tensor, "q4"); // the values are multiples of its scales already
    tensor.dispose();
    return [name, blocks];
  })));
  const generator = new Generator(model, LLM.prompt + wanted.most);
  const isPrefill = wanted.name.endsWith("prefill");
  const generate = async (length: number, maxTokens: number) => {
    for await (const _ of generator.generate(prompt(length), { maxTokens })) {
      /* tokens are only timed */
    }
    return generator.stats;
  };
  return {
    note: "q4 weights",
    async run(n) {
      if (!isPrefill) return (await generate(LLM.context, n + 1)).decodeMs / n;
      const start = performance.now();
      for (let i = 0; i < n; i++) await generate(LLM.prompt, 1);
      return (performance.now() - start) / n;
    },
    async sample(indices) {
      const input_ids = Int32Array.from(prompt(LLM.check));
      const pieces = [LLM.check - (isPrefill ? 0 : 1)];
      const { logits } = await evaluateIncremental(
        model, { batch: 1, seqlen: LLM.check, input_ids }, pieces);
      const last = centred(Array.from(logits.subarray((LLM.check - 1) * config.vocab_size)));
      return indices.map((i) => last[i]!);
    },
    dispose() {
      generator.dispose();
      model.dispose();
    },
  };
}

function build(wanted: Case, inputs: Inputs, put: (input: Input, dtype?: TensorDType) => Tensor): Chain {
  const input = (name: string) => inputs[name]!;
  const filled = (shape: number[], value: number | Float32Array): Tensor => {
    const size = shape.reduce((a, b) => a * b, 1);
    return put({ shape, data: typeof value === "number" ? new Float32Array(size).fill(value) : value });
  };
  const start = put(input("x"), wanted.name.includes("f16") ? "f16" : "f32");
  switch (wanted.name) {
    case "matmul_f32_512": case "matmul_f32_1024": {
      const w = put(input("w"));
      return { start, step: (x) => matmul(x, w, {}) };
    }
    case "matmul_f16_512": case "matmul_f16_1024": {
      const w = put(input("w"), "f16");
      return { start, note: "f16 storage, f32 sums", step: (x) => matmul(x, w, {}) };
    }
    case "matvec_q4_4096": case "matvec_q8_4096": {
      const w = quantize(put(input("w")), wanted.name.includes("q4") ? "q4" : "q8");
      return {
        start, note: `weights in ${w.format} blocks`, step: (x) => linear(x, w, null),
        async rounded() {
          const values = dequantize(w);
          const data = await values.read() as Float32Array;
          values.dispose();
          return { w: { shape: w.shape, data } };
        },
        dispose: () => w.dispose(),
      };
    }
    case "matvec_f32_4096": {
      const w = put(transposed(input("w")));
      return { start, step: (x) => linear(x, w, null) };
    }
    case "softmax_1024x4096": return { start, step: (x) => softmax(x) };
    case "layernorm_1024x4096": {
      const w = put(input("w"));
      return { start, step: (x) => rms_norm(x, w, EPS) };
    }
    case "attention_512x8x64": {
      const [k, v] = [put(input("k")), put(input("v"))];
      const options = { scale: 1 / Math.sqrt(ATTENTION.D), seq_idx: null, causal: false };
      return { start, step: (x) => attention(x, k, v, options) };
    }
    case "ssd_512": case "ssd_step": {
      const { H, P, N } = SSD;
      const L = start.shape[1]!;
      const A_log = filled([H], decays().map((g) => Math.log(-g)));
      const [D, dt_bias, dt] = [filled([H], 0), filled([H], 0), filled([1, L, H], DT_RAW)];
      const dt_limit = [0, Infinity] as const;
      if (L > 1) {
        const [b, c] = [put(input("b")), put(input("c"))];
        const options = { chunk_size: 64, dt_limit, initial_state: null, seq_idx: null };
        return { start, step: (x) => ssd_scan(x, dt, A_log, b, c, D, dt_bias, options)[0] };
      }
      const state = put(input("state"));
      const xBC = put({
        shape: [1, H * P + 2 * N],
        data: Float32Array.from(["x", "b", "c"].flatMap((name) => [...input(name).data])),
      });
      const dt1 = dt.reshape([1, H]);
      return {
        start, reset: () => state.write(input("state").data),
        step: () => selective_state_update(state, xBC, dt1, A_log, D, dt_bias, dt_limit),
      };
    }
    case "conv_silu_512": {
      const [w, bias] = [put(input("w")), put(input("bias"))];
      return { start, step: (x) => causal_conv1d(x, w, bias, null, null)[0]! };
    }
    case "mlp_train": {
      const [t1, t2] = [transposed(input("w1")), transposed(input("w2"))];
      const [w1, w2] = [put(t1), put(t2)];
      w1.requiresGrad = w2.requiresGrad = true;
      const minusTarget = put({ ...input("target"), data: input("target").data.map((value) => -value) });
      return {
        start, watched: w1, place: (i) => (i % MLP.F) * MLP.D + Math.floor(i / MLP.F),
        reset: () => {
          w1.write(t1.data);
          w2.write(t2.data);
        },
        step(x) {
          const tape = new Tape();
          const y = tape.run(() => linear(relu2(linear(x, w1, null)), w2, null));
          const dy = scale(add(y, minusTarget), 1 / MLP.B);
          const gradients = tape.backward([y], [dy]);
          for (const w of [w1, w2]) accumulate(w, scale(gradients.get(w.key)!, -LEARNING_RATE));
          for (const gradient of gradients.values()) gradient.release();
          return x;
        },
      };
    }
    case "copy_16m": return { start, step: (x) => scale(x, FACTOR) };
    default: {
      const names = CASES.map(({ name }) => name).join(", ");
      throw new Error(`The case must be one of ${names}, found ${wanted.name}.`);
    }
  }
}
