/** ONNX Runtime: graphs that repeat the op, timed as the difference of two lengths. */
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { fileURLToPath } from "node:url";
import { BLOCK, f32ToF16, packedInOrder, toBlocks } from "./blocks.ts";
import { offerWebGpu } from "./browser.ts";
import { type Case, type Input, ATTENTION, CONV, EPS, FACTOR, SSD, decays } from "./cases.ts";
import { type Graph, type Node, FLOAT, FLOAT16, encodeModel } from "./onnx.ts";
import { slope } from "./protocol.ts";
import type { Engine, Prepared } from "./runner.ts";

interface OrtTensor {
  readonly data: Float32Array;
}
interface Session {
  run(feeds: Record<string, OrtTensor>): Promise<Record<string, OrtTensor>>;
  release(): Promise<void>;
}
interface Ort {
  readonly InferenceSession: { create(model: Uint8Array, options: object): Promise<Session> };
  readonly Tensor: new (type: "float32", data: Float32Array, shape: readonly number[]) => OrtTensor;
  /** Of the build for pages. */
  readonly env: { readonly wasm: { wasmBinary?: Uint8Array; numThreads?: number } };
}

/** One link of the chain: from the tensors of the last link to those of the next, and what is sampled. */
interface Links {
  readonly op: string;
  readonly carried: readonly string[];
  readonly constants: Graph["constants"];
  readonly fixed?: Readonly<Record<string, Input>>;
  /** Nodes that read `carried` with the suffix `from` and write it (and `watched`) with the suffix `to`. */
  nodes(from: number, to: number): Node[];
  readonly watched?: string;
  /** What is carried is f16. */
  readonly isF16?: boolean;
}

/** The package for Node, native, on its WebGPU or its CPU provider. */
export async function ortEngine(provider: "webgpu" | "cpu"): Promise<Engine> {
  const require = createRequire(import.meta.url);
  const { version } = require("onnxruntime-node/package.json") as { version: string };
  return engine(require("onnxruntime-node") as Ort, version, provider);
}

/** The package for pages, in WebAssembly, on its WebGPU or its CPU provider. */
export async function ortWebEngine(provider: "webgpu" | "wasm", adapter: string): Promise<Engine> {
  const dist = new URL("node_modules/onnxruntime-web/dist/", import.meta.url);
  const open = async (module: string) => await import(new URL(module, dist).href) as Ort;
  let ort: Ort;
  if (provider === "webgpu") {
    await offerWebGpu(adapter);
    copySharedWrites();
    ort = await open("ort.webgpu.mjs");
    ort.env.wasm.wasmBinary = readFileSync(new URL("ort-wasm-simd-threaded.asyncify.wasm", dist));
    ort.env.wasm.numThreads = 1;
  } else {
    ort = await open("ort.node.min.mjs");
    ort.env.wasm.numThreads = 2;
  }
  const about = fileURLToPath(new URL("../package.json", dist));
  const { version } = JSON.parse(readFileSync(about, "utf8")) as { version: string };
  return engine(ort, version, provider);
}

/** Dawn takes no views of shared memory, which that of WebAssembly is. */
function copySharedWrites(): void {
  const { GPUQueue } = globalThis as unknown as { GPUQueue: { prototype: GPUQueue } };
  const write = GPUQueue.prototype.writeBuffer as (this: GPUQueue, ...args: unknown[]) => undefined;
  GPUQueue.prototype.writeBuffer = function (this: GPUQueue, buffer, offset, data, from = 0, size?) {
    const view = data as Uint8Array;
    if (!(view.buffer instanceof SharedArrayBuffer)) return write.call(this, buffer, offset, data, from,
      size);
    return write.call(this, buffer, offset, view.slice(from, size === undefined ? undefined : from + size));
  } as GPUQueue["writeBuffer"];
}

function engine(ort: Ort, version: string, provider: string): Engine {
  return {
    version,
    async prepare(wanted) {
      const inputs = wanted.inputs();
      const links = linksOf(wanted, inputs);
      return links === null ? null : prepared(ort, provider, links, inputs);
    },
  };
}

async function prepared(
  ort: Ort, provider: string, links: Links, inputs: Record<string, Input>,
): Promise<Prepared> {
  // The chain starts from constants, so that a run uploads one number. Adding it keeps the session's
  // optimiser from computing links before the first run.
  const feeds: Record<string, OrtTensor> = { zero: new ort.Tensor("float32", Float32Array.of(0), [1]) };
  const shapes: Record<string, readonly number[]> = { zero: [1] };
  const constants: Record<string, Graph["constants"][string]> = { ...links.constants };
  for (const name of links.carried) constants[`${name}_first`] = inputs[name]!;
  for (const [name, { data, shape }] of Object.entries(links.fixed ?? {})) {
    feeds[name] = new ort.Tensor("float32", data, shape);
    shapes[name] = shape;
  }
  const watched = links.watched ?? links.carried[0]!;
  const rank = inputs["x"]!.shape.length;
  const corner = (values: readonly number[]) =>
    ({ shape: [rank], data: BigInt64Array.from(values.map((value) => BigInt(value))) });
  const axes = Array.from({ length: rank }, (_, axis) => axis);
  const start = (name: string): Node[] => {
    const add = (to: string): Node => ({ op: "Add", inputs: [`${name}_first`, "zero"], outputs: [to] });
    if (!links.isF16) return [add(`${name}0`)];
    return [
      add(`${name}_f32`),
      { op: "Cast", attributes: { to: FLOAT16 }, inputs: [`${name}_f32`], outputs: [`${name}0`] },
    ];
  };
  const open = async (n: number, whole: boolean): Promise<Session> => {
    const nodes: Node[] = [
      ...links.carried.flatMap(start),
      ...Array.from({ length: n }, (_, i) => links.nodes(i, i + 1)).flat(),
    ];
    let last = `${watched}${n}`;
    if (!whole) {
      nodes.push({ op: "Slice", inputs: [last, "from", "to", "axes"], outputs: ["corner"] });
      last = "corner";
    }
    if (links.isF16) {
      nodes.push({ op: "Cast", attributes: { to: FLOAT }, inputs: [last], outputs: ["last_f32"] });
      last = "last_f32";
    }
    const model = encodeModel({
      nodes, inputs: shapes, outputs: [last],
      constants: whole ? constants : {
        ...constants, from: corner(axes.map(() => 0)), to: corner(axes.map(() => 1)), axes: corner(axes),
      },
    });
    const made = await ort.InferenceSession.create(model, {
      executionProviders: [provider], logSeverityLevel: 3,
      // A node that the GPU does not take must be an error, not silently the CPU's.
      extra: { session: { disable_cpu_ep_fallback: provider === "webgpu" ? "1" : "0" } },
    });
    await made.run(feeds);
    return made;
  };
  const sessions = new Map<number, Session>();
  const session = async (n: number): Promise<Session> => {
    const made = sessions.get(n) ?? await open(n, false);
    sessions.set(n, made);
    return made;
  };
  const time = async (links: number): Promise<number> => {
    const made = await session(links);
    const start = performance.now();
    await made.run(feeds);
    return performance.now() - start;
  };
  return {
    note: `${links.op}; time of n + 1 links less that of 1, over n`,
    run: (n) => slope(n, time),
    async sample(indices) {
      const whole = await open(1, true);
      const data = Object.values(await whole.run(feeds))[0]!.data;
      const values = indices.map((i) => data[i]!);
      await whole.release();
      return values;
    },
    async dispose() {
      for (const made of sessions.values()) await made.release();
    },
  };
}

function linksOf(wanted: Case, inputs: Record<string, Input>): Links | null {
  const constants = Object.fromEntries(Object.entries(inputs).filter(([name]) => name !== "x"));
  const one = (
    op: string, others: readonly string[], attributes: NonNullable<Node["attributes"]> = {}, domain = "",
  ): Links => ({
    op, carried: ["x"], constants,
    nodes: (from, to) => [{ op, domain, attributes, inputs: [`x${from}`, ...others], outputs: [`x${to}`] }],
  });
  const flat = (input: Input, shape: readonly number[]): Input => ({ shape, data: input.data });
  switch (wanted.name) {
    case "matmul_f32_512": case "matmul_f32_1024": case "matvec_f32_4096": return one("MatMul", ["w"]);
    case "matmul_f16_512": case "matmul_f16_1024": {
      const { shape, data } = inputs["w"]!;
      return {
        ...one("MatMul", ["w"]), isF16: true,
        constants: { w: { shape, data: Uint16Array.from(data, (value) => f32ToF16(value)) } },
      };
    }
    case "matvec_q4_4096": case "matvec_q8_4096": {
      const { shape: [N, K], data } = inputs["w"]!;
      const bits = wanted.name.includes("q4") ? 4 : 8;
      const blocks = toBlocks(data, bits);
      const codes = bits === 4 ? packedInOrder(blocks) : Uint8Array.from(blocks.codes, (code) => code + 128);
      // Level 4 lets it round the row to 8 bits, which is how it is fastest.
      const attributes = { K: K!, N: N!, bits, block_size: BLOCK, accuracy_level: 4 };
      return {
        ...one("MatMulNBits", ["codes", "scales"], attributes, "com.microsoft"),
        constants: {
          codes: { shape: [N!, K! / BLOCK, (BLOCK * bits) / 8], data: codes },
          scales: { shape: [blocks.scales.length], data: blocks.scales },
        },
      };
    }
    case "softmax_1024x4096": return one("Softmax", [], { axis: -1 });
    case "layernorm_1024x4096":
      return one("SimplifiedLayerNormalization", ["w"], { axis: -1, epsilon: { float: EPS } });
    case "attention_512x8x64": {
      const { L, H, D } = ATTENTION;
      const shape = [1, L, H * D];
      for (const name of ["x", "k", "v"]) inputs[name] = flat(inputs[name]!, shape);
      const attributes = { num_heads: H, scale: { float: 1 / Math.sqrt(D) } };
      return {
        ...one("MultiHeadAttention", ["k", "v"], attributes, "com.microsoft"),
        constants: { k: inputs["k"]!, v: inputs["v"]! },
      };
    }
    case "ssd_512": case "ssd_step": {
      const { H, P, N } = SSD;
      const L = inputs["x"]!.shape[1]!;
      const isStep = L === 1;
      const [x, state] = [flat(inputs["x"]!, [1, L, H * P]), inputs["state"]!];
      // ORT keeps the state as (keys, values), so (N, P) for our (P, N).
      const turned = new Float32Array(state.data.length);
      for (let i = 0; i < turned.length; i++) {
        const [h, n, p] = [Math.floor(i / (N * P)), Math.floor(i / P) % N, i % P];
        turned[i] = state.data[(h * P + p) * N + n]!;
      }
      inputs["x"] = x;
      inputs["state"] = { shape: [1, H, N, P], data: turned };
      const spread = (input: Input): Input => {
        const data = new Float32Array(L * H * N);
        for (let i = 0; i < data.length; i++) {
          data[i] = input.data[Math.floor(i / (H * N)) * N + (i % N)]!;
        }
        return { shape: [1, L, H * N], data };
      };
      const g = decays();
      const decay = { shape: [1, L, H], data: Float32Array.from({ length: L * H }, (_, i) => g[i % H]!) };
      const fixed = { q: spread(inputs["c"]!), k: spread(inputs["b"]!), decay, ...(isStep ? { x } : {}) };
      return {
        op: "LinearAttention (gated)", constants: {}, fixed,
        carried: isStep ? ["state"] : ["x"], ...(isStep ? { watched: "y" } : {}),
        nodes: (from, to) => [{
          op: "LinearAttention", domain: "com.microsoft",
          attributes: { q_num_heads: H, kv_num_heads: H, update_rule: "gated", scale: { float: 1 } },
          inputs: isStep ? ["q", "k", "x", `state${from}`, "decay"] : ["q", "k", `x${from}`, "", "decay"],
          outputs: isStep ? [`y${to}`, `state${to}`] : [`x${to}`, `dropped${to}`],
        }],
      };
    }
    case "conv_silu_512": {
      const { C, K } = CONV;
      return {
        op: "CausalConvWithState (silu)", carried: ["x"],
        constants: { w: flat(inputs["w"]!, [C, 1, K]), bias: inputs["bias"]! },
        nodes: (from, to) => [{
          op: "CausalConvWithState", domain: "com.microsoft",
          attributes: { activation: "silu", channels_last: 1 },
          inputs: [`x${from}`, "w", "bias"], outputs: [`x${to}`, `dropped${to}`],
        }],
      };
    }
    case "copy_16m":
      return { ...one("Mul", ["factor"]), fixed: { factor: { shape: [1], data: Float32Array.of(FACTOR) } } };
    default: return null;
  }
}
