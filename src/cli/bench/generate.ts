/** The suite `generate`: the first token, with everything compiled for it, prefill, decode, host's share. */
import { median } from "../../gpu/measure.ts";
import type { Graph } from "../../gpu/stream.ts";
import { Generator } from "../../infer/engine.ts";
import { countParameters, forwardFlops, stateBytes } from "../../models/accounting.ts";
import type { NemotronHConfig } from "../../models/config.ts";
import { disposeCache, type ModelCache, NemotronH, stepContext } from "../../models/nemotron_h.ts";
import { blockFormatOf, createWeights, type WeightFormat } from "../../models/parameters.ts";
import { argmax } from "../../ops/sample.ts";
import { bitsPerValue } from "../../tensor/blocks.ts";
import { openDevice } from "../../tensor/device.ts";
import { scope, unscoped } from "../../tensor/scope.ts";
import { findConfig } from "../models.ts";
import type { Bench } from "./runner.ts";

const SUITE = "generate";
const NEW_TOKENS = 32;

export const promptOf = (config: NemotronHConfig, length: number): number[] =>
  Array.from({ length }, (_, i) => (7 * i) % Math.min(256, config.vocab_size));

/** Bytes that a decoded token reads and writes at least: the weights it meets, and its state in f32. */
export function decodeBytes(
  config: NemotronHConfig, position: number, weights: WeightFormat = "f32",
): number {
  const { active } = countParameters(config);
  const { ssm, conv, kvPerToken } =
    stateBytes(config, { ssm: "float32", conv: "float32", kv: "float32" });
  const rows = config.vocab_size * config.hidden_size - config.hidden_size; // one row of the embedding
  return weightBytes(weights) * (active - rows) + 2 * (ssm + conv) + kvPerToken * (position + 1);
}

/** Bytes per weight; of blocks with their part of the block's scale. */
function weightBytes(format: WeightFormat): number {
  const blocks = blockFormatOf(format);
  if (!blocks) return format === "f32" ? 4 : 2;
  return bitsPerValue(blocks) / 8;
}

const modelName = ({ options: { config, weights } }: Bench) =>
  (weights === "f32" ? config : `${config}_${weights}`);

/** The launches of one decoded token over a cache, as generation captures them. */
export class DecodeStep {
  readonly cache: ModelCache;
  readonly graph: Graph;
  readonly #model: NemotronH;
  readonly #token;

  constructor(model: NemotronH, capacity: number) {
    this.#model = model;
    this.cache = model.createCache(1, capacity);
    this.#token = unscoped(() => model.device.zeros([1, 1], "i32"));
    this.graph = model.device.capture(() => scope(() => {
      const h = model.hidden(this.#token, stepContext(this.cache, { decode: true }), this.cache);
      argmax(model.logits(h.reshape([1, model.config.hidden_size])));
    })).graph;
  }

  /** Every replay decodes at this position, whatever the caches hold there. */
  at(position: number): void {
    this.cache.position.write(Uint32Array.from([position]));
  }

  replay(): void {
    this.#model.device.replay(this.graph);
  }

  dispose(): void {
    this.#model.device.stream.disposeGraph(this.graph);
    this.#token.dispose();
    disposeCache(this.cache);
  }
}

export async function benchGenerate(bench: Bench): Promise<void> {
  const { device, options: { config: name } } = bench;
  const config = findConfig(name);
  await cold(bench, config);
  const model = new NemotronH(config, createWeights(device, config, 0, bench.options.weights));
  for (const length of [64, 512]) await prefill(bench, model, length);
  for (const draft of config.num_nextn_predict_layers > 0 ? [0, 2] : [0]) await decode(bench, model, draft);
  model.dispose();
}

/** On a device that has compiled nothing, with the weights there already. */
async function cold(bench: Bench, config: NemotronHConfig): Promise<void> {
  const name = `first_token_${modelName(bench)}_64`;
  if (!bench.wants(SUITE, name)) return;
  const times: number[] = [];
  for (let run = 0; run < Math.min(3, bench.options.runs); run++) {
    const device = await openDevice({ adapter: bench.device.info.id });
    try {
      const model = new NemotronH(config, createWeights(device, config, 0, bench.options.weights));
      await device.finish();
      const start = performance.now();
      const generator = new Generator(model, 65);
      for await (const _ of generator.generate(promptOf(config, 64), { maxTokens: 1 })) {
        times.push(performance.now() - start);
      }
    } finally {
      device.destroy();
    }
  }
  await bench.add({
    suite: SUITE, case: name, times: times.sort((a, b) => a - b), unit: "ms", work: 1,
    remark: "every shader compiled",
  });
}

async function prefill(bench: Bench, model: NemotronH, length: number): Promise<void> {
  const { config } = model;
  const name = `prefill_${modelName(bench)}_${length}`;
  if (!bench.wants(SUITE, name)) return;
  const generator = new Generator(model, length + 1);
  const times: number[] = [];
  for (let run = -1; run < bench.options.runs; run++) {
    for await (const _ of generator.generate(promptOf(config, length), { maxTokens: 1 })) {
      /* the first token ends the prefill */
    }
    if (run >= 0) times.push(generator.stats.prefillMs);
  }
  generator.dispose();
  // The head works for the last position alone.
  const head = 2 * config.vocab_size * config.hidden_size;
  const flops = length * (forwardFlops(config, (length + 1) / 2) - head) + head;
  await bench.add({
    suite: SUITE, case: name, times: times.sort((a, b) => a - b), unit: "tokens/s", work: length,
    bound: { by: "matmul", work: flops }, details: { model_flops: flops },
  });
}

async function decode(bench: Bench, model: NemotronH, draft: number): Promise<void> {
  const { config } = model;
  const name = `decode_${modelName(bench)}${draft > 0 ? `_draft_${draft}` : ""}`;
  if (!bench.wants(SUITE, name)) return;
  const prompt = promptOf(config, 64);
  const generator = new Generator(model, prompt.length + NEW_TOKENS + draft);
  const times: number[] = [];
  const hosts: number[] = [];
  for (let run = -1; run < bench.options.runs; run++) {
    for await (const _ of generator.generate(prompt, { maxTokens: NEW_TOKENS, draft })) {
      /* tokens are only timed */
    }
    if (run < 0) continue;
    times.push(generator.stats.decodeMs / (NEW_TOKENS - 1));
    hosts.push(generator.stats.hostMs / generator.stats.decodeMs);
  }
  const { stats } = generator;
  generator.dispose();
  times.sort((a, b) => a - b);
  const bytes = decodeBytes(config, prompt.length + NEW_TOKENS / 2, bench.options.weights);
  if (draft > 0) {
    const tokens = stats.tokens / Math.max(1, stats.passes);
    await bench.add({
      suite: SUITE, case: name, times, unit: "tokens/s", work: 1, details: { tokens_per_pass: tokens },
      remark: `${tokens.toFixed(2)} tokens a pass`,
    });
    return;
  }
  // The same launches when many are under way: what of a token is neither waiting nor the host's.
  const step = new DecodeStep(model, prompt.length + NEW_TOKENS);
  step.at(prompt.length + NEW_TOKENS / 2);
  const [replay_ms, launches] = [median(await bench.time(() => step.replay())), step.graph.launches];
  step.dispose();
  hosts.sort((a, b) => a - b);
  const host_share = median(hosts);
  await bench.add({
    suite: SUITE, case: name, times, unit: "tokens/s", work: 1, bound: { by: "copy", work: bytes },
    details: { launches, replay_ms, host_share },
    remark: `host ${Math.round(100 * host_share)} % of a token, ${launches} launches`,
  });
}
