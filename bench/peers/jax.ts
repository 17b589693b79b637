/** jax-js on its WebGPU backend, each link jitted. */
import { readFileSync } from "node:fs";
import { type Case, type Input, EPS, FACTOR, LEARNING_RATE, MLP } from "./cases.ts";
import { offerWebGpu } from "./browser.ts";
import { addIteratorHelpers } from "./iterator_helpers.ts";
import type { Engine, Prepared } from "./runner.ts";

/** An operation takes its arguments away; `ref` is one more use of an array. */
interface Arr {
  readonly ref: Arr;
  mul(other: Arr | number): Arr;
  add(other: Arr | number): Arr;
  sub(other: Arr | number): Arr;
  div(other: Arr): Arr;
  sum(): Arr;
  astype(type: unknown): Arr;
  dispose(): void;
  data(): Promise<Float32Array>;
  blockUntilReady(): Promise<Arr>;
}
type Step = (...args: Arr[]) => Arr[];
/** The part of the library that is called here. */
interface Jax {
  init(device: string): Promise<string[]>;
  defaultDevice(device: string): string;
  jit(f: Step): Step;
  grad(f: (...args: Arr[]) => Arr, options: { argnums: number[] }): (...args: Arr[]) => Arr[];
  readonly numpy: {
    readonly float16: unknown;
    readonly float32: unknown;
    array(data: Float32Array, options: { shape: readonly number[] }): Arr;
    matmul(a: Arr, b: Arr): Arr;
    mean(x: Arr, axis: number, options: { keepdims: boolean }): Arr;
    sqrt(x: Arr): Arr;
    maximum(a: Arr, b: number): Arr;
  };
  readonly nn: {
    softmax(x: Arr, axis: number): Arr;
    dotProductAttention(q: Arr, k: Arr, v: Arr, options: { isCausal: boolean }): Arr;
  };
}

/** `step` takes what is carried, then what stays, and returns what is carried on, the sampled array first. */
interface Chain {
  readonly op: string;
  readonly carried: readonly Arr[];
  readonly fixed: readonly Arr[];
  readonly step: Step;
}

export async function jaxEngine(adapter: string): Promise<Engine> {
  await offerWebGpu(adapter);
  addIteratorHelpers();
  const name: string = "@jax-js/jax"; // not a literal: the project type checks without it
  const jax = await import(name) as Jax;
  const found = await jax.init("webgpu");
  if (!found.includes("webgpu")) throw new Error("The device webgpu did not start.");
  jax.defaultDevice("webgpu");
  const about = new URL("node_modules/@jax-js/jax/package.json", import.meta.url);
  const { version } = JSON.parse(readFileSync(about, "utf8")) as { version: string };
  return {
    version,
    async prepare(wanted) {
      const chain = build(jax, wanted, wanted.inputs());
      return chain && prepared(jax, chain);
    },
  };
}

function prepared(jax: Jax, chain: Chain): Prepared {
  const step = jax.jit(chain.step);
  const apply = (n: number): readonly Arr[] => {
    let state: readonly Arr[] = chain.carried.map((x) => x.ref);
    for (let i = 0; i < n; i++) state = step(...state, ...chain.fixed.map((x) => x.ref));
    return state;
  };
  return {
    note: chain.op,
    async run(n) {
      const start = performance.now();
      const state = apply(n);
      for (const x of state) await x.blockUntilReady();
      const ms = (performance.now() - start) / n;
      for (const x of state) x.dispose();
      return ms;
    },
    async sample(indices) {
      const [first, ...others] = apply(1);
      for (const x of others) x.dispose();
      const data = await first!.astype(jax.numpy.float32).data();
      return indices.map((i) => data[i]!);
    },
    dispose: () => [...chain.carried, ...chain.fixed].forEach((x) => x.dispose()),
  };
}

function build(jax: Jax, wanted: Case, inputs: Record<string, Input>): Chain | null {
  const { numpy: np, nn } = jax;
  const put = (name: string, shape?: readonly number[]) =>
    np.array(inputs[name]!.data, { shape: shape ?? inputs[name]!.shape });
  const one = (op: string, fixed: readonly Arr[], step: (x: Arr, ...rest: Arr[]) => Arr): Chain =>
    ({ op, carried: [put("x")], fixed, step: (...args) => [step(args[0]!, ...args.slice(1))] });
  switch (wanted.name) {
    case "matmul_f32_512": case "matmul_f32_1024": case "matvec_f32_4096":
      return one("matmul", [put("w")], (x, w) => np.matmul(x, w!));
    case "matmul_f16_512": case "matmul_f16_1024": {
      const half = (name: string) => put(name).astype(np.float16);
      return {
        op: "matmul", carried: [half("x")], fixed: [half("w")],
        step: (x, w) => [np.matmul(x!, w!)],
      };
    }
    case "softmax_1024x4096": return one("nn.softmax", [], (x) => nn.softmax(x, -1));
    case "layernorm_1024x4096":
      return one("composed", [put("w")], (x, w) => {
        const size = np.sqrt(np.mean(x.ref.mul(x.ref), -1, { keepdims: true }).add(EPS));
        return x.div(size).mul(w!);
      });
    case "attention_512x8x64":
      return one("nn.dotProductAttention", [put("k"), put("v")], (x, k, v) =>
        nn.dotProductAttention(x, k!, v!, { isCausal: false }));
    case "mlp_train": {
      const loss = (w1: Arr, w2: Arr, x: Arr, target: Arr): Arr => {
        const h = np.maximum(np.matmul(x, w1), 0);
        const d = np.matmul(h.ref.mul(h), w2).sub(target);
        return d.ref.mul(d).sum().mul(0.5 / MLP.B);
      };
      const gradients = jax.grad(loss as (...args: Arr[]) => Arr, { argnums: [0, 1] });
      return {
        op: "grad", carried: [put("w1"), put("w2")], fixed: [put("x"), put("target")],
        step(w1, w2, x, target) {
          const [g1, g2] = gradients(w1!.ref, w2!.ref, x!, target!);
          return [w1!.sub(g1!.mul(LEARNING_RATE)), w2!.sub(g2!.mul(LEARNING_RATE))];
        },
      };
    }
    case "copy_16m": return one("mul", [], (x) => x.mul(FACTOR));
    default: return null;
  }
}
