import { appendFileSync, existsSync, mkdirSync } from "node:fs";
import { dirname } from "node:path";
import { pathToFileURL } from "node:url";
import { Tape } from "../../autograd/tape.ts";
import { type SoftwareDriver, softwareDriver } from "../../gpu/fallback.node.ts";
import { median, sortedTimes } from "../../gpu/measure.ts";
import { Generator } from "../../infer/engine.ts";
import { createParameters, createWeights, WEIGHT_FORMATS, type WeightFormat } from "../../models/parameters.ts";
import { NemotronH } from "../../models/nemotron_h.ts";
import { attention } from "../../ops/attention.ts";
import { scale } from "../../ops/elementwise.ts";
import { linear } from "../../ops/linear.ts";
import { matmul } from "../../ops/matmul.ts";
import { rms_norm } from "../../ops/rms_norm.ts";
import { ssd_scan } from "../../ops/ssd_scan.ts";
import { type Device, openDevice } from "../../tensor/device.ts";
import { KraitError, UsageError } from "../../tensor/errors.ts";
import { scope } from "../../tensor/scope.ts";
import type { Tensor } from "../../tensor/tensor.ts";
import { byteTokenizer } from "../../text/byte_tokenizer.ts";
import { splitDocuments } from "../../train/data.ts";
import { readDocuments } from "../../train/data.node.ts";
import { tokenizeDocuments } from "../../train/packing.ts";
import { makeRecipe } from "../../train/recipe.ts";
import { TrainingRun } from "../../train/run.ts";
import { defineCommand } from "../args.ts";
import { findConfig } from "../models.ts";
import { packagePath } from "../package.ts";
import { colours, table, wantsColour } from "../terminal.ts";

/** What the command itself reads of a line of the peers suite. */
interface PeerResult {
  readonly case: string;
  readonly peer: string;
  readonly ms: number;
  readonly peer_ms: number;
  readonly ratio: number;
  readonly rel_err: number | null;
  readonly peer_rel_err: number | null;
  readonly peer_ok: boolean;
  readonly peer_kind: "gpu" | "cpu";
}

/** What bench/peers/main.ts exports. */
export interface Peers {
  summarise(results: readonly PeerResult[]): { case: string; peer: string; ratio: number }[];
  benchPeers(
    device: Device, runs: number, filter: readonly string[],
    report: (result: PeerResult) => void, complain: (line: string) => void, software: SoftwareDriver | null,
  ): Promise<void>;
}

interface Result {
  readonly suite: string;
  readonly case: string;
  readonly adapter: string;
  /** Median milliseconds, and the spread from the fastest to the slowest run. */
  readonly ms: number;
  readonly min_ms: number;
  readonly max_ms: number;
  readonly rate: number;
  readonly unit: "GFLOP/s" | "GB/s" | "tokens/s";
}

const SUITE_NAMES = ["kernels", "train", "generate", "peers"] as const;
/** `peers` takes minutes and needs packages of its own, so it runs only when named. */
const DEFAULT_SUITES = SUITE_NAMES.filter((name) => name !== "peers");

export const bench = defineCommand({
  name: "bench",
  summary: "Measure kernels, a training step and generation on an adapter.",
  positionals: [
    { name: "SUITE", help: `${SUITE_NAMES.join(", ")}; default: all but peers`, optional: true, many: true },
  ],
  options: {
    config: {
      type: "string", value: "PRESET|FILE", default: "tiny",
      help: "The model of the train and generate suites.",
    },
    data: {
      type: "string", value: "PATH", multiple: true,
      help: "Text for the train suite; default: this package's README.",
    },
    weights: {
      type: "string", choices: WEIGHT_FORMATS, default: "f32",
      help: "How the generate suite holds matrices.",
    },
    runs: { type: "integer", min: 1, default: 7, help: "Timed runs per case; the median counts." },
    adapter: {
      type: "string", value: "NAME", help: "Part of an adapter's name; default: the best one found.",
    },
    case: {
      type: "string", value: "PART", multiple: true,
      help: "Part of a case's name, for the peers suite; default: all cases.",
    },
    out: { type: "string", value: "FILE", help: "Append one JSON line per case to this file." },
    json: { type: "boolean", help: "Print one JSON line per case." },
  },
  examples: [
    "krait bench kernels", "krait bench --adapter swiftshader --json", "krait bench peers --case matmul",
  ],
  async run({ options, args, stdout, stderr, env }) {
    for (const name of args) {
      if (!SUITE_NAMES.some((suite) => suite === name)) {
        throw new UsageError(`The suite must be one of ${SUITE_NAMES.join(", ")}, found "${name}".`);
      }
    }
    const peers = args.includes("peers") ? await loadPeers() : null;
    const device = await openDevice(options.adapter ? { adapter: options.adapter } : {});
    const wanted: readonly string[] = args.length > 0 ? args : DEFAULT_SUITES;
    const results: Result[] = [];
    const c = colours(wantsColour(stdout, env));
    const add = (
      suite: string, name: string, work: number, unit: Result["unit"], times: readonly number[],
    ) => {
      const ms = median(times);
      const result: Result = {
        suite, case: name, adapter: device.info.id, ms, min_ms: times[0]!, max_ms: times.at(-1)!, unit,
        rate: unit === "tokens/s" ? (1000 * work) / ms : work / ms / 1e6,
      };
      results.push(result);
      record(result);
    };
    const record = (line: object) => {
      if (options.json) stdout.write(`${JSON.stringify(line)}\n`);
      if (options.out) {
        mkdirSync(dirname(options.out), { recursive: true });
        appendFileSync(options.out, `${JSON.stringify({
          ...line, date: new Date().toISOString(), node: process.version,
        })}\n`);
      }
    };
    const compared: PeerResult[] = [];
    try {
      if (wanted.includes("kernels")) await kernels(device, options.runs, add);
      if (wanted.includes("train")) await training(device, options.config, options.data, options.runs, add);
      if (wanted.includes("generate")) await generation(device, options.config, options.weights, options.runs, add);
      await peers?.benchPeers(device, options.runs, options.case, (result) => {
        compared.push(result);
        record({ suite: "peers", ...result });
      }, (line) => void stderr.write(line), softwareDriver());
    } finally {
      device.destroy();
    }
    if (peers && compared.length === 0) throw new KraitError("No peer could be compared with; stderr says why.");
    if (!options.json) {
      stdout.write(`${c.bold(`On ${device.info.name}, medians of ${options.runs} runs`)}\n`);
      const measured = results.map((r) => [
        ` ${r.suite}`, r.case, `${r.ms.toFixed(2)} ms`, `${r.min_ms.toFixed(2)} to ${r.max_ms.toFixed(2)}`,
        `${r.rate.toFixed(r.rate < 10 ? 2 : 1)} ${r.unit}`,
      ]);
      if (measured.length > 0) stdout.write(`${table(measured)}\n`);
      const rows = compared.map((r) => [
        " peers", r.case, `${r.ms} ms`, r.peer, `${r.peer_ms} ms`, `${r.ratio}x`,
        r.peer_ok ? "" : `wrong by ${r.peer_rel_err}`,
      ]);
      if (rows.length > 0) stdout.write(`${table(rows)}\n`);
      const best = (peers?.summarise(compared) ?? []).map((s) => [` ${s.case}`, `${s.ratio}x`, s.peer]);
      if (best.length > 0) {
        stdout.write(`${c.bold("Against the fastest right answer on the adapter")}\n${table(best)}\n`);
      }
    }
  },
});

/** The peers suite lives beside the sources and not in the package. */
async function loadPeers(): Promise<Peers> {
  const module = packagePath("bench/peers/main.ts");
  if (!existsSync(module)) {
    throw new UsageError(
      "The suite peers needs a clone of the sources and: npm install --ignore-scripts --prefix bench/peers");
  }
  return await import(/* @vite-ignore */ pathToFileURL(module).href) as Peers;
}

type Add = (
  suite: string, name: string, work: number, unit: Result["unit"], times: readonly number[],
) => void;

async function kernels(device: Device, runs: number, add: Add): Promise<void> {
  const made: Tensor[] = [];
  const make = (shape: number[]) => {
    const count = shape.reduce((a, b) => a * b, 1);
    const tensor = device.tensor(Float32Array.from({ length: count }, (_, i) => Math.sin(i) / 8), shape);
    made.push(tensor);
    return tensor;
  };
  const time = async (name: string, work: number, unit: Result["unit"], body: () => unknown) => {
    const run = () => scope(() => void body());
    run();
    await device.finish();
    add("kernels", name, work, unit, await sortedTimes(runs, run, () => device.finish()));
  };
  const square = make([512, 512]);
  await time("matmul_f32_512", 2 * 512 ** 3, "GFLOP/s", () => matmul(square, square, {}));
  const [x, w] = [make([2048, 128]), make([384, 128])];
  await time("linear_2048x128x384", 2 * 2048 * 128 * 384, "GFLOP/s", () => linear(x, w, null));
  const [vector, matrix] = [make([1, 2048]), make([2048, 2048])];
  await time("matvec_f32_2048", 4 * 2048 ** 2, "GB/s", () => linear(vector, matrix, null));
  const rows = make([1024, 4096]);
  await time("copy_4m", 8 * rows.size, "GB/s", () => scale(rows, 2));
  const weight = make([4096]);
  await time("rms_norm_1024x4096", 8 * rows.size, "GB/s", () => rms_norm(rows, weight, 1e-5));
  const q = make([1, 512, 8, 64]);
  await time(
    "attention_512x8x64", 4 * 8 * 512 * 512 * 64 / 2, "GFLOP/s",
    () => attention(q, q, q, { scale: 1 / 8, seq_idx: null }));
  const [u, dt, A_log, B, D] =
    [make([1, 512, 16, 64]), make([1, 512, 16]), make([16]), make([1, 512, 1, 128]), make([16])];
  const options = { chunk_size: 64, dt_limit: [0, Infinity] as const, initial_state: null, seq_idx: null };
  await time(
    "ssd_512", 5 * 512 * 16 * 64 * 128, "GFLOP/s", () => ssd_scan(u, dt, A_log, B, B, D, A_log, options));
  for (const tensor of [u, dt, A_log, B, D]) tensor.requiresGrad = true;
  const dy = make(u.shape as number[]);
  await time("ssd_512_backward", 3 * 5 * 512 * 16 * 64 * 128, "GFLOP/s", () => {
    const tape = new Tape();
    const [y] = tape.run(() => ssd_scan(u, dt, A_log, B, B, D, A_log, options));
    for (const gradient of tape.backward([y], [dy]).values()) gradient.release();
  });
  for (const tensor of made) tensor.dispose();
}

async function training(
  device: Device, name: string, data: readonly string[], runs: number, add: Add,
): Promise<void> {
  const config = findConfig(name);
  const recipe = makeRecipe({ steps: runs + 2 });
  const documents = readDocuments(data.length > 0 ? data : [packagePath("README.md")]);
  const { train, validation } = splitDocuments(documents);
  const tokenizer = byteTokenizer(config.vocab_size);
  const model = new NemotronH(config, createParameters(device, config, 0));
  const run = new TrainingRun(
    model, recipe, tokenizeDocuments(train, tokenizer), tokenizeDocuments(validation, tokenizer));
  for (let i = 0; i < 2; i++) await run.step(); // compiles
  const times: number[] = [];
  for (let i = 0; i < runs; i++) {
    const start = performance.now();
    await run.step();
    times.push(performance.now() - start);
  }
  const { batch, seqlen } = recipe;
  add("train", `step_${name}_${batch}x${seqlen}`, batch * seqlen, "tokens/s", times.sort((a, b) => a - b));
  run.dispose();
  model.dispose();
}

async function generation(
  device: Device, name: string, weights: WeightFormat, runs: number, add: Add,
): Promise<void> {
  const config = findConfig(name);
  const model = new NemotronH(config, createWeights(device, config, 0, weights));
  const prompt = Array.from({ length: 256 }, (_, i) => (7 * i) % Math.min(256, config.vocab_size));
  const suffix = weights === "f32" ? "" : `_${weights}`;
  const newTokens = 32;
  for (const draft of config.num_nextn_predict_layers > 0 ? [0, 2] : [0]) {
    const generator = new Generator(model, prompt.length + newTokens + draft);
    const prefill: number[] = [];
    const decode: number[] = [];
    for (let i = 0; i <= runs; i++) {
      for await (const _ of generator.generate(prompt, { maxTokens: newTokens, draft })) {
        /* tokens are only timed */
      }
      if (i === 0) continue; // compiles
      prefill.push(generator.stats.prefillMs);
      decode.push(generator.stats.decodeMs);
    }
    const sort = (times: number[]) => times.sort((a, b) => a - b);
    if (draft === 0) add("generate", `prefill_${prompt.length}${suffix}`, prompt.length, "tokens/s", sort(prefill));
    add(
      "generate", `${draft === 0 ? "decode" : `decode_draft_${draft}`}${suffix}`, newTokens - 1, "tokens/s", sort(decode));
    generator.dispose();
  }
  model.dispose();
}
