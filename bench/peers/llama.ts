/** llama.cpp through node-llama-cpp, with the binaries that its packages bring. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { LLM } from "./cases.ts";
import { centred, hybridGguf, prompt } from "./hybrid.ts";
import type { Engine } from "./runner.ts";

type Ids = readonly number[];
interface Sequence {
  clearHistory(): Promise<void>;
  evaluate(ids: Ids, options: object): AsyncGenerator<number>;
  controlledEvaluate(input: readonly unknown[]): Promise<(
    undefined | { next: { logits: Map<number, number> } })[]>;
}
interface Model {
  readonly gpuLayers: number;
  createContext(options: object): Promise<{ getSequence(options: object): Sequence }>;
}
/** The part of the library that is called here. */
interface Library {
  getLlama(options: object): Promise<{ loadModel(options: object): Promise<Model> }>;
}

export async function llamaEngine(gpu: "vulkan" | null): Promise<Engine> {
  const name: string = "node-llama-cpp"; // not a literal: the project type checks without it
  const { getLlama } = await import(name) as Library;
  const complaints: string[] = [];
  const llama = await getLlama({
    gpu: gpu ?? false, build: "never", skipDownload: true, progressLogs: false, vramPadding: 0,
    logLevel: "warn", logger: (_: unknown, text: string) => complaints.push(text.trim()),
  });
  const about = new URL("node_modules/node-llama-cpp/package.json", import.meta.url);
  const { version } = JSON.parse(readFileSync(about, "utf8")) as { version: string };
  return {
    version,
    async prepare(wanted) {
      const config = wanted.model!;
      const folder = mkdtempSync(join(tmpdir(), "krait-bench-"));
      const modelPath = join(folder, "model.gguf");
      let model: Model;
      try {
        writeFileSync(modelPath, hybridGguf(config, wanted.inputs()));
        model = await llama.loadModel({
          modelPath, gpuLayers: gpu ? "max" : 0, ignoreMemorySafetyChecks: true, useMmap: false,
        });
      } catch (error) {
        throw new Error(`${(error as Error).message}: ${complaints.join("; ")}`);
      } finally {
        rmSync(folder, { recursive: true, force: true });
      }
      if (gpu && model.gpuLayers === 0) throw new Error("It found no device for its layers.");
      const context = await model.createContext({
        contextSize: 1024, batchSize: LLM.prompt, threads: 2, ignoreMemorySafetyChecks: true,
      });
      const sequence = context.getSequence({ checkpoints: { max: 0, interval: false } });
      /** A run of a prompt: its first token is there when this resolves. */
      const begin = async (length: number): Promise<AsyncGenerator<number>> => {
        await sequence.clearHistory();
        const tokens = sequence.evaluate(prompt(length), { temperature: 0, yieldEogToken: true });
        await tokens.next();
        return tokens;
      };
      return {
        note: "Q4_0, f16 cache",
        async run(n) {
          const isPrefill = wanted.name.endsWith("prefill");
          const tokens = isPrefill ? null : await begin(LLM.context);
          const start = performance.now();
          for (let i = 0; i < n; i++) {
            if (tokens) await tokens.next();
            else await (await begin(LLM.prompt)).return(undefined);
          }
          const ms = (performance.now() - start) / n;
          await tokens?.return(undefined);
          return ms;
        },
        async sample(indices) {
          await sequence.clearHistory();
          const ids = prompt(LLM.check);
          const input = ids.map((id, i) => (
            i < ids.length - 1 ? id : [id, { generateNext: { logits: true } }]));
          const { logits } = (await sequence.controlledEvaluate(input)).at(-1)!.next;
          const all = centred(Array.from({ length: config.vocab_size }, (_, i) => logits.get(i) ?? NaN));
          return indices.map((i) => all[i]!);
        },
        dispose: () => sequence.clearHistory(),
      };
    },
  };
}
