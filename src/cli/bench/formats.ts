/**
 * The suite `formats`: one model as a bf16, an FP8 and an NVFP4 checkpoint, loaded side by side; decoded
 * tokens in turns, so that all meet the same machine, and what a weight takes in the file and on the device.
 */
import { existsSync } from "node:fs";
import { basename, join } from "node:path";
import { codedEntries } from "../../compress/export.ts";
import { encodeMatrix } from "../../compress/encode.ts";
import { fits, selectModules } from "../../compress/modules.ts";
import { median } from "../../gpu/measure.ts";
import { Generator } from "../../infer/engine.ts";
import { openFolder } from "../../io/files.node.ts";
import { type Folder, memorySource } from "../../io/files.ts";
import {
  encodeSafetensors, INDEX_FILE, openTensors, SINGLE_FILE, type TensorEntry,
} from "../../io/safetensors.ts";
import { countParameters } from "../../models/accounting.ts";
import { loadModel, readParameters } from "../../models/checkpoint.ts";
import { listCheckpointTensors, tensorsOf } from "../../models/checkpoint_names.ts";
import type { NemotronHConfig } from "../../models/config.ts";
import type { NemotronH } from "../../models/nemotron_h.ts";
import { createWeights } from "../../models/parameters.ts";
import type { Device } from "../../tensor/device.ts";
import { encodeFloat } from "../../tensor/dtype.ts";
import { sizeOf } from "../../tensor/ndarray.ts";
import { Tensor } from "../../tensor/tensor.ts";
import { findConfig, modelFolder } from "../models.ts";
import { decodeBytes, promptOf } from "./generate.ts";
import type { Bench } from "./runner.ts";

const SUITE = "formats";
const FORMATS = ["bf16", "fp8", "nvfp4"] as const;
const NEW_TOKENS = 32;
const PROMPT = 16;

interface Contestant {
  readonly format: (typeof FORMATS)[number];
  readonly name: string;
  readonly model: NemotronH;
  readonly generator: Generator;
  readonly fileBytes: number;
  readonly deviceBytes: number;
  readonly times: number[];
}

export async function benchFormats(bench: Bench): Promise<void> {
  const { device, options: { config: where, runs } } = bench;
  const config = findConfig(where);
  const model = basename(where, ".json");
  const wanted = FORMATS.map((format) => ({ format, name: `decode_${model}_${format}` }))
    .filter(({ name }) => bench.wants(SUITE, name));
  if (wanted.length === 0) return;
  const values = await valuesOf(device, config, where);
  const contestants: Contestant[] = [];
  for (const { format, name } of wanted) {
    const { folder, bytes } = await checkpointOf(config, values, format);
    const before = device.pool.liveBytes;
    const model = await loadModel(device, config, folder, false, "bf16");
    const deviceBytes = device.pool.liveBytes - before;
    contestants.push({
      format, name, model, generator: new Generator(model, PROMPT + NEW_TOKENS), fileBytes: bytes,
        deviceBytes,
      times: [],
    });
  }
  for (let run = -1; run < runs; run++) {
    for (const { generator, times, name } of contestants) {
      bench.working(SUITE, name);
      for await (const _ of generator.generate(promptOf(config, PROMPT), { maxTokens: NEW_TOKENS })) {
        /* tokens are only timed */
      }
      if (run >= 0) times.push(generator.stats.decodeMs / (NEW_TOKENS - 1));
    }
  }
  const { total } = countParameters(config);
  for (const each of contestants) {
    const ratios = each.times.map((ms, run) => contestants[0]!.times[run]! / ms).toSorted((a, b) => a - b);
    const [file, onDevice] = [each.fileBytes / total, each.deviceBytes / total];
    await bench.add({
      suite: SUITE, case: each.name, times: each.times.toSorted((a, b) => a - b), unit: "tokens/s", work: 1,
      bound: { by: "copy", work: decodeBytes(config, PROMPT + NEW_TOKENS / 2, each.format) },
      details: {
        bytes_per_weight: file, device_bytes_per_weight: onDevice, ratio: median(ratios),
        ratio_to: contestants[0]!.format,
      },
      remark: `${file.toFixed(3)} bytes per weight in the file, ${onDevice.toFixed(3)} on the device, ` +
        `${median(ratios).toFixed(2)}x ${contestants[0]!.format}`,
    });
    each.generator.dispose();
    each.model.dispose();
  }
}

/** The weights of a model folder, or random ones, by checkpoint name. */
async function valuesOf(
  device: Device, config: NemotronHConfig, where: string,
): Promise<Map<string, Float32Array>> {
  const values = new Map<string, Float32Array>();
  const take = (parameter: Parameters<typeof tensorsOf>[0], whole: Float32Array) => {
    tensorsOf(parameter).forEach(({ name, shape }, i) =>
      values.set(name, whole.slice(i * sizeOf(shape), (i + 1) * sizeOf(shape))));
  };
  const isFolder = existsSync(join(where, "config.json")) || existsSync(join(where, "latest"));
  const folder = isFolder ? modelFolder(where) : null;
  if (folder && [INDEX_FILE, SINGLE_FILE].some((file) => existsSync(join(folder, file)))) {
    const reader = await openTensors(openFolder(folder));
    try {
      await readParameters(config, reader, async (_, read, parameter) => take(parameter, await read()));
    } finally {
      await reader.close();
    }
    return values;
  }
  const weights = createWeights(device, config, 0, "f32");
  const parameters = new Map(listCheckpointTensors(config).map(
    ({ parameter }) => [parameter.name, parameter]));
  for (const [name, weight] of weights) {
    if (weight instanceof Tensor) take(parameters.get(name)!, await weight.read() as Float32Array);
    weight.dispose();
  }
  return values;
}

/** A checkpoint in memory: every matrix whose blocks fit in the format but the table of tokens, else bf16. */
async function checkpointOf(
  config: NemotronHConfig, values: ReadonlyMap<string, Float32Array>, format: (typeof FORMATS)[number],
): Promise<{ folder: Folder; bytes: number }> {
  const coded = new Set(format === "bf16" ? [] : selectModules(config, ["backbone.embeddings"]).chosen
    .filter((module) => fits(module, format)).map(({ tensor }) => tensor.name));
  const entries = listCheckpointTensors(config).flatMap(({ name, shape }): TensorEntry[] => {
    const value = values.get(name)!;
    if (format === "bf16" || !coded.has(name)) {
      return [{ name, dtype: "BF16", shape, bytes: encodeFloat("BF16", value) }];
    }
    return codedEntries(name.replace(/\.weight$/, ""), encodeMatrix(value, shape, format), null);
  });
  const file = await encodeSafetensors(entries);
  const folder: Folder = {
    name: format, open: async (name) => (name === SINGLE_FILE ? memorySource(name, file) : null),
  };
  return { folder, bytes: file.length };
}
