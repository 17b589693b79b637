/**
 * Post-training quantisation: a model with f32 weights and some text in, the tensors of a quantised
 * checkpoint out.
 */
import { codedBytes, type CodedWeight, dequantised } from "../io/quantized.ts";
import type { TensorEntry, TensorReader } from "../io/safetensors.ts";
import {
  listCheckpointTensors, type Placement, resolveTensors, tensorsOf,
} from "../models/checkpoint_names.ts";
import { readParameters } from "../models/checkpoint.ts";
import type { NemotronH } from "../models/nemotron_h.ts";
import { global_norm } from "../ops/global_norm.ts";
import { linear } from "../ops/linear.ts";
import type { Device } from "../tensor/device.ts";
import { byteLengthOf, encodeFloat } from "../tensor/dtype.ts";
import { FormatError, KraitError, UsageError } from "../tensor/errors.ts";
import { sizeOf } from "../tensor/ndarray.ts";
import { scope } from "../tensor/scope.ts";
import { assignFormats, type Choice } from "./assign.ts";
import {
  ALPHAS, applyFold, channelScales, columnWeights, type Fold, inputMagnitudes, listFolds, scaleColumns,
} from "./awq.ts";
import { type Calibration, type CalibrationData, calibrate, meanLoss } from "./calibrate.ts";
import { distill, type Distilled, type DistillOptions } from "./distill.ts";
import { Divergence } from "./divergence.ts";
import { BITS, BLOCK, encodeMatrix, type TargetFormat } from "./encode.ts";
import { codedEntries, kvEntries } from "./export.ts";
import { fits, groupModules, type Module, selectModules } from "./modules.ts";

export const METHODS = ["max", "mse", "awq"] as const;
export type Method = (typeof METHODS)[number];

export interface QuantiseOptions {
  readonly format: TargetFormat | "mixed";
  readonly method: Method;
  /** Patterns of module names that stay as they are. */
  readonly exclude: readonly string[];
  /** Scales for keys and values in FP8. */
  readonly kvCache: boolean;
  /** Bits per quantisable weight, for `mixed`. */
  readonly bits?: number | undefined;
  /** Trains the quantised matrices towards the model's own predictions; not with `mse`. */
  readonly distill?: DistillOptions | undefined;
}

export interface ModuleReport {
  readonly module: string;
  readonly format: TargetFormat | "bf16";
  /** RMS of what the weights lost, relative to that of the weights. */
  readonly weight_error: number;
  /** The same of the outputs on calibration inputs; null where none were met. */
  readonly output_error: number | null;
}

/** What a group of modules would lose in each format: KL divergence of the predictions, in nats. */
export interface Sensitivity {
  readonly group: string;
  readonly weights: number;
  readonly cost: Readonly<Record<string, number>>;
  readonly format: TargetFormat | "bf16";
}

export interface Quantised {
  readonly entries: readonly TensorEntry[];
  /** Formats of the quantised modules. */
  readonly modules: ReadonlyMap<string, TargetFormat>;
  readonly excluded: readonly string[];
  readonly unmatched: readonly string[];
  readonly reports: readonly ModuleReport[];
  readonly sensitivities: readonly Sensitivity[];
  readonly loss_before: number;
  readonly distilled: Distilled | null;
  /** Bits per weight of the modules that could be quantised, and of the whole checkpoint. */
  readonly module_bits: number;
  readonly bits: number;
  readonly bytes: number;
}

/** What is going on: a word, and how far that part of the work is. */
export type OnProgress = (phase: string, done: number, total: number) => void;

type AnyFormat = TargetFormat | "bf16";

/**
 * Chooses codes and scales for a model's matrices.
 * @param model f32 weights of the checkpoint that `reader` reads; worthless afterwards
 * @throws UsageError for rows that are no whole blocks of the format, or a budget that cannot be met;
 *   FormatError for weights, KraitError for a loss that is not finite
 */
export async function quantiseModel(
  model: NemotronH, reader: TensorReader, data: CalibrationData, options: QuantiseOptions,
  onProgress: OnProgress = () => {},
): Promise<Quantised> {
  const { config, device } = model;
  const { format, method } = options;
  const selection = selectModules(config, options.exclude);
  if (options.distill && method === "mse") {
    throw new UsageError("Distillation rounds by the largest value, which the method mse does not.");
  }
  if (format !== "mixed") for (const module of selection.chosen) checkBlocks(module, format);
  const values = new Map<string, Float32Array>();
  await readParameters(config, reader, async (_, read, parameter) => {
    const whole = await read();
    for (const { name, shape, expert } of tensorsOf(parameter)) {
      const size = sizeOf(shape);
      values.set(name, expert === null ? whole : whole.slice(expert * size, (expert + 1) * size));
      checkFinite(name, values.get(name)!);
    }
  });
  const loss_before = await meanLoss(model, data.evaluation);
  if (!Number.isFinite(loss_before)) {
    throw new KraitError(
      `The model's loss on the calibration text is ${loss_before}: expected a finite number to quantise by.`);
  }
  const calibration = await calibrate(model, data.calibration, (done) =>
    onProgress("calibrating", done, data.calibration.length));

  const changed = new Set<string>();
  if (method === "awq") {
    const formats = new Map(selection.chosen.map((module) =>
      [module.tensor.name, format === "mixed" ? smallest(module) : format]));
    const folds = listFolds(config);
    for (const [i, fold] of folds.entries()) {
      for (const name of await searchFold(device, fold, formats, values, calibration)) changed.add(name);
      onProgress("scaling channels", i + 1, folds.length);
    }
    writeParameters(model, changed, values);
  }

  const encode = (module: Module, target: TargetFormat) =>
    encodeMatrix(values.get(module.tensor.name)!, module.tensor.shape, target, method === "mse");
  let assigned = new Map<string, AnyFormat>();
  let sensitivities: Sensitivity[] = [];
  if (format === "mixed") {
    sensitivities = await assignMixed(
      model, selection.chosen, values, encode, data, options.bits, onProgress);
    const byGroup = new Map(sensitivities.map((each) => [each.group, each.format]));
    for (const group of groupModules(selection.chosen)) {
      for (const { name } of group.modules) assigned.set(name, byGroup.get(group.name)!);
    }
  } else {
    assigned = new Map(selection.chosen.map(({ name }) => [name, format]));
  }

  const originals = new Map(values);
  const distilled = options.distill ? await distill(
    model, data.calibration, new Map(selection.chosen.map(({ name, tensor }) =>
      [tensor.name, assigned.get(name)!])), values, options.distill,
    (done) => onProgress("distilling", done, options.distill!.steps)) : null;

  const coded = new Map<string, CodedWeight>();
  const halves = new Set<string>();
  const reports: ModuleReport[] = [];
  for (const [i, module] of selection.chosen.entries()) {
    const target = assigned.get(module.name)!;
    const original = originals.get(module.tensor.name)!;
    let rounded: Float32Array;
    if (target === "bf16") {
      halves.add(module.tensor.name);
      rounded = roundedToBf16(values.get(module.tensor.name)!);
    } else {
      const weight = encode(module, target);
      coded.set(module.tensor.name, weight);
      rounded = dequantised(weight);
    }
    const delta = rounded.map((value, j) => value - original[j]!);
    const inputs = calibration.inputs.get(module.tensor.name)?.sample() ?? new Float32Array(0);
    const rows = module.tensor.shape[0]!;
    const total = await outputNorm(device, inputs, original, rows);
    reports.push({
      module: module.name, format: target, weight_error: ratio(norm(delta), norm(original)),
      output_error: inputs.length === 0 ? null
        : ratio(await outputNorm(device, inputs, delta, rows), total),
    });
    onProgress("quantising", i + 1, selection.chosen.length);
  }

  const entries = collectEntries(model, reader, values, {
    coded, halves, changed, calibration, kvCache: options.kvCache,
  });
  const bytes = entries.reduce((sum, { dtype, shape }) => sum + byteLengthOf(dtype, sizeOf(shape))!, 0);
  const size = (names: Iterable<string>) => [...names].reduce(
    (sum, name) => sum + values.get(name)!.length, 0);
  const chosenBytes = selection.chosen.reduce((sum, { tensor: { name } }) =>
    sum + (coded.has(name) ? codedBytes(coded.get(name)!) : 2 * values.get(name)!.length), 0);
  const modules = new Map([...assigned].filter(
    (entry): entry is [string, TargetFormat] => entry[1] !== "bf16"));
  return {
    entries, modules, reports, sensitivities, loss_before, distilled, bytes,
    excluded: [...selection.excluded, ...[...assigned.keys()].filter((name) => !modules.has(name))],
    unmatched: selection.unmatched,
    module_bits: (8 * chosenBytes) / size(selection.chosen.map(({ tensor }) => tensor.name)),
    bits: (8 * bytes) / size(values.keys()),
  };
}

function checkFinite(name: string, values: Float32Array): void {
  const at = values.findIndex((value) => !Number.isFinite(value));
  if (at < 0) return;
  throw new FormatError(`tensor "${name}": expected finite weights, found ${values[at]} at ${at}`);
}

function checkBlocks(module: Module, format: TargetFormat): void {
  if (fits(module, format)) return;
  throw new UsageError(
    `${module.name} must have rows of whole ${format} blocks of ${BLOCK[format]} weights, found ` +
    `[${module.tensor.shape.join(", ")}]; leave it out with --exclude ${module.name}.`);
}

/** The smallest format whose blocks fit. */
function smallest(module: Module): TargetFormat {
  return fits(module, "nvfp4") ? "nvfp4" : "fp8";
}

/** Finds the channel scales that make the outputs' error least, and applies them where they help. */
async function searchFold(
  device: Device, fold: Fold, formats: ReadonlyMap<string, TargetFormat>,
  values: Map<string, Float32Array>, calibration: Calibration,
): Promise<string[]> {
  const consumers = fold.consumers.flatMap((name) => {
    const [format, stats] = [formats.get(name), calibration.inputs.get(name)];
    return format && stats && stats.rows > 0
      ? [{ format, stats, values: values.get(name)!, inputs: stats.sample() }] : [];
  });
  if (consumers.length === 0) return [];
  const { width } = fold;
  const x = inputMagnitudes(consumers.map(({ stats }) => stats), width);
  const w = columnWeights(consumers, width);
  const errorOf = async (scales: Float64Array): Promise<number> => {
    let error = 0;
    for (const { values: weight, format, inputs } of consumers) {
      const shape = [weight.length / width, width];
      const rounded = dequantised(encodeMatrix(scaleColumns(weight, scales), shape, format));
      const delta = rounded.map((value, i) => value / scales[i % width]! - weight[i]!);
      error += (await outputNorm(device, inputs, delta, shape[0]!)) ** 2;
    }
    return error;
  };
  let best: Float64Array | null = null;
  let least = await errorOf(new Float64Array(width).fill(1));
  for (const alpha of ALPHAS) {
    const scales = channelScales(x, w, alpha, fold);
    const error = await errorOf(scales);
    if (error < least) [least, best] = [error, scales];
  }
  return best ? applyFold(fold, best, values, calibration.inputs) : [];
}

/** Measures what every group loses in every format, and spends the budget where it helps most. */
async function assignMixed(
  model: NemotronH, chosen: readonly Module[], values: ReadonlyMap<string, Float32Array>,
  encode: (module: Module, format: TargetFormat) => CodedWeight, data: CalibrationData,
  budget: number | undefined, onProgress: OnProgress,
): Promise<Sensitivity[]> {
  if (budget === undefined) throw new UsageError("A mixed assignment needs a budget in bits per weight.");
  const groups = groupModules(chosen);
  const sizes = groups.map(({ modules }) => modules.reduce(
    (sum, { tensor }) => sum + sizeOf(tensor.shape), 0));
  const total = sizes.reduce((a, b) => a + b, 0);
  const formatsOf = (modules: readonly Module[]): AnyFormat[] =>
    (["nvfp4", "fp8", "bf16"] as const).filter((format) =>
      format === "bf16" || modules.every((module) => fits(module, format)));
  const choices = groups.map(({ modules }, g) =>
    formatsOf(modules).map((format) => ({ format, bits: BITS[format] * sizes[g]!, cost: 0 })));
  await assignFormats(choices, total, budget); // says what is wrong with the budget before the long part
  const divergence = await Divergence.of(model, data.calibration.slice(0, 4));
  const costs: Choice<AnyFormat>[][] = [];
  for (const [g, { modules }] of groups.entries()) {
    costs.push([]);
    for (const choice of choices[g]!) {
      const trial = new Map(values);
      for (const module of modules) {
        const { name } = module.tensor;
        trial.set(name, choice.format === "bf16" ? roundedToBf16(values.get(name)!)
          : dequantised(encode(module, choice.format)));
      }
      const names = new Set(modules.map(({ tensor }) => tensor.name));
      writeParameters(model, names, trial);
      costs[g]!.push({ ...choice, cost: await divergence.measure() });
      writeParameters(model, names, values);
    }
    onProgress("measuring sensitivity", g + 1, groups.length);
  }
  const assigned = await assignFormats(costs, total, budget);
  return groups.map(({ name }, g) => ({
    group: name, weights: sizes[g]!, format: assigned[g]!.format,
    cost: Object.fromEntries(costs[g]!.map(({ format, cost }) => [format, cost])),
  }));
}

/** Puts the values of some checkpoint tensors into a model with f32 weights. */
function writeParameters(
  model: NemotronH, names: ReadonlySet<string>, values: ReadonlyMap<string, Float32Array>,
): void {
  const parameters = new Set(listCheckpointTensors(model.config)
    .filter(({ name }) => names.has(name)).map(({ parameter }) => parameter));
  for (const parameter of parameters) {
    const whole = new Float32Array(sizeOf(parameter.shape));
    const parts = tensorsOf(parameter);
    parts.forEach(({ name }, i) => whole.set(values.get(name)!, i * (whole.length / parts.length)));
    model.parameters.get(parameter.name)!.write(whole);
  }
}

/** || x w^T || of inputs [rows, width] and a matrix [out, width]. */
async function outputNorm(
  device: Device, inputs: Float32Array, matrix: Float32Array, out: number,
): Promise<number> {
  if (inputs.length === 0) return 0;
  const width = matrix.length / out;
  const result = scope(() => global_norm([
    linear(device.tensor(inputs, [inputs.length / width, width]), device.tensor(matrix, [out, width]), null),
  ]));
  return (await result.read().finally(() => result.dispose()))[0]!;
}

function collectEntries(
  model: NemotronH, reader: TensorReader, values: ReadonlyMap<string, Float32Array>,
  { coded, halves, changed, calibration, kvCache }: {
    coded: ReadonlyMap<string, CodedWeight>; halves: ReadonlySet<string>; changed: ReadonlySet<string>;
    calibration: Calibration; kvCache: boolean;
  },
): TensorEntry[] {
  const entries: TensorEntry[] = [];
  const placements = new Map<string, Placement>(
    resolveTensors(model.config, reader.tensors).map((placement) => [placement.parameter.name, placement]));
  for (const { name, shape, parameter, expert } of listCheckpointTensors(model.config)) {
    const weight = coded.get(name);
    const { from, tensors } = placements.get(parameter.name)!;
    if (weight) {
      const stats = calibration.inputs.get(name);
      entries.push(...codedEntries(
        name.replace(/\.weight$/, ""), weight, stats && stats.rows > 0 ? stats.amax : null));
    } else if (halves.has(name)) {
      entries.push({ name, dtype: "BF16", shape, bytes: () => encodeFloat("BF16", values.get(name)!) });
    } else if (changed.has(name)) {
      entries.push({ name, dtype: "F32", shape, bytes: () => encodeFloat("F32", values.get(name)!) });
    } else if (from !== "zeros") {
      const whole = from === "whole";
      const source = whole ? tensors[0]! : tensors[expert!]!;
      const size = sizeOf(shape);
      const range = whole && expert !== null ? { start: expert * size, count: size } : undefined;
      const { dtype } = reader.info(source);
      entries.push({ name, dtype, shape, bytes: () => reader.read(source, range) });
    }
  }
  if (kvCache) for (const [path, amax] of calibration.kv) entries.push(...kvEntries(path, amax));
  return entries;
}

function roundedToBf16(values: Float32Array): Float32Array {
  const codes = encodeFloat("BF16", values);
  const bits = new Uint16Array(codes.buffer, codes.byteOffset, values.length);
  return new Float32Array(Uint32Array.from(bits, (code) => code << 16).buffer);
}

function norm(values: Float32Array): number {
  return Math.sqrt(values.reduce((sum, x) => sum + x * x, 0));
}

function ratio(part: number, whole: number): number {
  return whole > 0 ? part / whole : 0;
}
