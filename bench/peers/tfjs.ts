/** TensorFlow.js on its WebGPU backend. What it has no single op for is composed of its ops. */
import { createRequire } from "node:module";
import { type Case, type Input, ATTENTION, CONV, EPS, FACTOR, LEARNING_RATE, MLP } from "./cases.ts";
import { offerWebGpu } from "./browser.ts";
import type { Engine, Prepared } from "./runner.ts";

interface Tensor {
  dispose(): void;
  data(): Promise<Float32Array>;
}
type Shape = readonly number[];
interface Backend {
  readonly device: GPUDevice;
  /** Null where nothing waits to be submitted; submitQueue fails then. */
  readonly commandEncoder: GPUCommandEncoder | null;
  endComputePassEncoder(): void;
  submitQueue(): void;
}
/** The part of the library that is called here. */
interface Tf {
  readonly version_core: string;
  setBackend(name: string): Promise<boolean>;
  ready(): Promise<void>;
  backend(): Backend;
  tensor(data: Float32Array, shape: Shape): Tensor;
  matMul(a: Tensor, b: Tensor, transposeA?: boolean, transposeB?: boolean): Tensor;
  softmax(x: Tensor): Tensor;
  square(x: Tensor): Tensor;
  relu(x: Tensor): Tensor;
  sigmoid(x: Tensor): Tensor;
  rsqrt(x: Tensor): Tensor;
  mean(x: Tensor, axis: number, keepDims: boolean): Tensor;
  add(a: Tensor, b: Tensor | number): Tensor;
  sub(a: Tensor, b: Tensor): Tensor;
  mul(a: Tensor, b: Tensor | number): Tensor;
  reshape(x: Tensor, shape: Shape): Tensor;
  transpose(x: Tensor, order: Shape): Tensor;
  pad(x: Tensor, widths: readonly Shape[]): Tensor;
  depthwiseConv2d(x: Tensor, filter: Tensor, strides: Shape, pad: string): Tensor;
  tidy<T>(body: () => T): T;
}

interface Chain {
  readonly op: string;
  /** From what the last link left to what the next begins with; the first is sampled. */
  step(state: Tensor[]): Tensor[];
  readonly start: Tensor[];
}

export async function tfjsEngine(adapter: string): Promise<Engine> {
  await offerWebGpu(adapter);
  // The library asks for a window before it registers its backend.
  Object.defineProperty(globalThis, "window", { value: globalThis, configurable: true });
  const require = createRequire(import.meta.url);
  const tf = require("@tensorflow/tfjs-core") as Tf;
  require("@tensorflow/tfjs-backend-webgpu");
  if (!await tf.setBackend("webgpu")) throw new Error("The backend webgpu did not start.");
  await tf.ready();
  return {
    version: tf.version_core,
    async prepare(wanted) {
      const chain = build(tf, wanted, wanted.inputs());
      return chain && prepared(tf, chain);
    },
  };
}

function prepared(tf: Tf, chain: Chain): Prepared {
  const finish = async () => {
    const backend = tf.backend();
    backend.endComputePassEncoder();
    if (backend.commandEncoder) backend.submitQueue();
    await backend.device.queue.onSubmittedWorkDone();
  };
  const drop = (state: Tensor[]) => {
    if (state !== chain.start) for (const tensor of state) tensor.dispose();
  };
  const apply = (n: number): Tensor[] => {
    let state = chain.start;
    for (let i = 0; i < n; i++) {
      const next = tf.tidy(() => chain.step(state));
      drop(state);
      state = next;
    }
    return state;
  };
  return {
    note: chain.op,
    async run(n) {
      await finish();
      const start = performance.now();
      const state = apply(n);
      await finish();
      const ms = (performance.now() - start) / n;
      drop(state);
      return ms;
    },
    async sample(indices) {
      const state = apply(1);
      const data = await state[0]!.data();
      drop(state);
      return indices.map((i) => data[i]!);
    },
    dispose: () => chain.start.forEach((tensor) => tensor.dispose()),
  };
}

function build(tf: Tf, wanted: Case, inputs: Record<string, Input>): Chain | null {
  const put = (name: string, shape?: Shape) => tf.tensor(inputs[name]!.data, shape ?? inputs[name]!.shape);
  const one = (op: string, start: Tensor, step: (x: Tensor) => Tensor): Chain =>
    ({ op, start: [start], step: ([x]) => [step(x!)] });
  switch (wanted.name) {
    case "matmul_f32_512": case "matmul_f32_1024": case "matvec_f32_4096": {
      const w = put("w");
      return one("matMul", put("x"), (x) => tf.matMul(x, w));
    }
    case "softmax_1024x4096": return one("softmax", put("x"), (x) => tf.softmax(x));
    case "layernorm_1024x4096": {
      const w = put("w");
      return one("composed", put("x"), (x) =>
        tf.mul(tf.mul(x, tf.rsqrt(tf.add(tf.mean(tf.square(x), 1, true), EPS))), w));
    }
    case "attention_512x8x64": {
      const { L, H, D } = ATTENTION;
      const heads = (x: Tensor) => tf.transpose(tf.reshape(x, [L, H, D]), [1, 0, 2]);
      const [k, v] = [heads(put("k")), heads(put("v"))];
      return one("composed, heads outermost", tf.reshape(put("x"), [1, L, H, D]), (x) => {
        const scores = tf.mul(tf.matMul(heads(x), k, false, true), 1 / Math.sqrt(D));
        const y = tf.matMul(tf.softmax(scores), v);
        return tf.reshape(tf.transpose(y, [1, 0, 2]), [1, L, H, D]);
      });
    }
    case "conv_silu_512": {
      const { L, C, K } = CONV;
      const turned = new Float32Array(K * C);
      for (let i = 0; i < K * C; i++) turned[(i % K) * C + Math.floor(i / K)] = inputs["w"]!.data[i]!;
      const [w, bias] = [tf.tensor(turned, [K, 1, C, 1]), put("bias")];
      return one("pad, depthwiseConv2d, composed silu", put("x", [1, L, 1, C]), (x) => {
        const padded = tf.pad(x, [[0, 0], [K - 1, 0], [0, 0], [0, 0]]);
        const y = tf.add(tf.depthwiseConv2d(padded, w, [1, 1], "valid"), bias);
        return tf.mul(y, tf.sigmoid(y));
      });
    }
    case "mlp_train": {
      const [x, target] = [put("x"), put("target")];
      return {
        // The package registers its gradients only in builds for bundlers; these are the same products.
        op: "matMul forward and backward, composed by hand", start: [put("w1"), put("w2")],
        step([w1, w2]) {
          const relu = tf.relu(tf.matMul(x, w1!));
          const h = tf.square(relu);
          const dy = tf.mul(tf.sub(tf.matMul(h, w2!), target), 1 / MLP.B);
          const da = tf.mul(tf.mul(tf.matMul(dy, w2!, false, true), relu), 2);
          const descend = (w: Tensor, g: Tensor) => tf.sub(w, tf.mul(g, LEARNING_RATE));
          return [descend(w1!, tf.matMul(x, da, true)), descend(w2!, tf.matMul(h, dy, true))];
        },
      };
    }
    case "copy_16m": return one("mul", put("x"), (x) => tf.mul(x, FACTOR));
    default: return null; // no scan op, and a composed one would be 512 dependent steps
  }
}
