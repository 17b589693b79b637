/** Models to and from checkpoint files in the published layout. */
import type { Folder } from "../io/files.ts";
import {
  type CodedFormat, CODED_FORMATS, type CodedWeight, companionsOf, readFloatScales, readStoredWeight,
    readWeightF32,
  storedFormat,
} from "../io/quantized.ts";
import {
  openTensors, safetensorsPieces, type TensorEntry, type TensorInfo, type TensorReader,
} from "../io/safetensors.ts";
import type { KVScales } from "../nn/attention.ts";
import type { Weight } from "../nn/weights.ts";
import { BlockTensor } from "../tensor/blocks.ts";
import type { Device } from "../tensor/device.ts";
import { bytesPerElement, decodeFloat32 } from "../tensor/dtype.ts";
import { FormatError, UsageError } from "../tensor/errors.ts";
import { sizeOf } from "../tensor/ndarray.ts";
import { unscoped } from "../tensor/scope.ts";
import { Tensor } from "../tensor/tensor.ts";
import {
  canonicalName, listParameters, type Parameter, resolveTensors, tensorsOf,
} from "./checkpoint_names.ts";
import { type NemotronHConfig, serialiseConfig } from "./config.ts";
import type { HostArray, Outputs } from "./evaluate.ts";
import { type KVFormat, NemotronH } from "./nemotron_h.ts";
import {
  canBeCoded, checkFits, type KeptFormats, storeParameter, trainableParameters, type WeightFormat,
} from "./parameters.ts";

/**
 * Finds every parameter in a checkpoint and hands it over, one after the other.
 * @param take gets the canonical name, a function that reads the values as float32, the parameter, and the
 *   names of the tensors that hold it
 * @throws FormatError when a tensor is missing, extra or of another shape, before anything is read.
 */
export async function readParameters(
  config: NemotronHConfig, reader: TensorReader,
  take: (
    name: string, values: () => Promise<Float32Array>, parameter: Parameter, tensors: readonly string[],
  ) => Promise<void>,
  what?: string,
): Promise<void> {
  for (const { parameter, from, tensors } of resolveTensors(config, reader.tensors, what ? { what } : {})) {
    await take(parameter.name, async () => {
      if (from === "whole") return readWeightF32(reader, tensors[0]!);
      const values = new Float32Array(sizeOf(parameter.shape));
      for (const [i, name] of tensors.entries()) {
        values.set(await readWeightF32(reader, name), i * (values.length / tensors.length));
      }
      return values;
    }, parameter, tensors);
  }
}

/**
 * The scales of keys and values in FP8 that a checkpoint holds, by the path of the attention layer's mixer;
 * one that is missing beside the other is 1.
 * @throws FormatError for a scale that is not one positive finite number
 */
export async function readKVScales(reader: TensorReader): Promise<Map<string, KVScales>> {
  const scales = new Map<string, { key: number; value: number }>();
  for (const { name, size } of reader.tensors.values()) {
    const [, path, which] = /^(.*)\.([kv])_proj\.\2_scale$/.exec(canonicalName(name)) ?? [];
    if (path === undefined) continue;
    if (size !== 1) throw new FormatError(`tensor "${name}": expected 1 scale, found ${size}`);
    const scale = (await readFloatScales(reader, name))[0]!;
    scales.set(path, { key: 1, value: 1, ...scales.get(path), [which === "k" ? "key" : "value"]: scale });
  }
  return scales;
}

/**
 * The formats of matrices that a checkpoint stores as codes with scales and that can be held so. Experts of
 * one layer in several formats, and rows that are no whole blocks, become f32 instead.
 * @throws FormatError for tensors that do not fit the config
 */
export function keptFormats(
  config: NemotronHConfig, found: ReadonlyMap<string, TensorInfo>, what?: string,
): KeptFormats {
  const kept = new Map<string, CodedFormat>();
  for (const { parameter, tensors } of resolveTensors(config, found, what ? { what } : {})) {
    const layouts = new Set(tensors.map((name) =>
      `${storedFormat(found, name)} ${name.endsWith(".weight_packed")}`));
    const format = storedFormat(found, tensors[0]!);
    if (layouts.size === 1 && format && canBeCoded(parameter, format)) kept.set(parameter.name, format);
  }
  return kept;
}

/** What a checkpoint holds in one format. */
export interface StoredPart {
  /** f32, bf16, ... for plain numbers, or that of the codes. */
  readonly format: string;
  /** Parameters, or parts of stacked ones. */
  readonly tensors: number;
  readonly weights: number;
  /** With scales. */
  readonly bytes: number;
}

export interface StoredModel {
  /** By format, the one with the most weights first. */
  readonly parts: readonly StoredPart[];
  readonly kept: KeptFormats;
  readonly kv: KVFormat;
}

/**
 * What a checkpoint folder holds, from the headers of its files.
 * @throws FormatError for tensors that do not fit the config
 */
export async function inspectCheckpoint(config: NemotronHConfig, folder: Folder): Promise<StoredModel> {
  const reader = await openTensors(folder);
  try {
    const parts = new Map<string, { tensors: number; weights: number; bytes: number }>();
    for (const { parameter, tensors } of resolveTensors(config, reader.tensors, { what: folder.name })) {
      for (const name of tensors) {
        const { dtype, byteLength } = reader.info(name);
        const format = storedFormat(reader.tensors, name) ?? dtype.toLowerCase();
        const part = parts.get(format) ?? { tensors: 0, weights: 0, bytes: 0 };
        const scales = companionsOf(name).reduce((sum, scale) =>
          sum + (reader.tensors.get(scale)?.byteLength ?? 0), 0);
        parts.set(format, {
          tensors: part.tensors + 1, weights: part.weights + sizeOf(parameter.shape) / tensors.length,
          bytes: part.bytes + byteLength + scales,
        });
      }
    }
    return {
      parts: [...parts].map(([format, part]) => ({ format, ...part }))
        .toSorted((a, b) => b.weights - a.weights),
      kept: keptFormats(config, reader.tensors, folder.name),
      kv: (await readKVScales(reader)).size > 0 ? "fp8" : "f32",
    };
  } finally {
    await reader.close();
  }
}

/** Codes and scales of one matrix, or of the experts of a layer, as one tensor on the device. */
async function loadCoded(
  device: Device, reader: TensorReader, { shape, name }: Parameter, tensors: readonly string[],
): Promise<BlockTensor> {
  const parts: CodedWeight[] = [];
  for (const tensor of tensors) parts.push(await readStoredWeight(reader, tensor) as CodedWeight);
  const { format, divides } = parts[0]!;
  const codes = joined(parts.map((part) => part.codes));
  const global = Float32Array.from(parts, (part) => part.global);
  if (CODED_FORMATS[format].scale !== "F32") {
    const scales = joined(parts.map((part) => part.scales));
    return unscoped(() => BlockTensor.fromCodes(
      device, format, shape, { codes, scales, global: format === "nvfp4" ? global : null, divides, name }));
  }
  // One scale for each expert, or, where one of them has a scale for every row, all have.
  const lists = parts.map((part) => decodeFloat32("F32", part.scales));
  const rows = Math.max(...lists.map((list) => list.length));
  const scales = Float32Array.from({ length: rows * lists.length }, (_, i) => {
    const list = lists[Math.floor(i / rows)]!;
    return list.length === 1 ? list[0]! : list[i % rows]!;
  });
  return unscoped(() => BlockTensor.fromCodes(device, format, shape, { codes, scales, name }));
}

function joined(parts: readonly Uint8Array[]): Uint8Array {
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

/**
 * Loads a checkpoint folder (model.safetensors, or shards with an index) onto a device. Matrices that are
 * stored as codes with scales (FP8, MXFP8, MXFP4, NVFP4) stay so, unless they are to be trained.
 * @param trainable parameters require gradients; then `weights` must be f32
 * @param weights the format on the device of matrices that are stored as plain numbers
 * @throws FormatError for a checkpoint that does not fit the config;
 *   OutOfMemoryError when it does not fit the device.
 */
export async function loadModel(
  device: Device, config: NemotronHConfig, folder: Folder, trainable = false, weights: WeightFormat = "f32",
): Promise<NemotronH> {
  if (trainable && weights !== "f32") {
    throw new UsageError(`Weights that are trained must be f32, found ${weights}.`);
  }
  const reader = await openTensors(folder);
  let parameters = new Map<string, Weight>();
  try {
    const kept: KeptFormats = trainable ? new Map() : keptFormats(config, reader.tensors, folder.name);
    checkFits(device, config, weights, kept);
    if (trainable) parameters = unscoped(() => trainableParameters(device, config));
    await readParameters(config, reader, async (name, values, parameter, tensors) => {
      if (kept.has(name)) {
        parameters.set(name, await loadCoded(device, reader, parameter, tensors));
        return;
      }
      const data = await values();
      const made = parameters.get(name);
      if (made instanceof Tensor) made.write(data);
      else parameters.set(name, unscoped(() => storeParameter(device, parameter, data, weights)));
    }, folder.name);
    return new NemotronH(config, parameters, trainable ? new Map() : await readKVScales(reader));
  } catch (error) {
    for (const tensor of parameters.values()) tensor.dispose();
    throw error;
  } finally {
    await reader.close();
  }
}

/** A tensor in its own format, read back when its turn to be written comes. */
export function tensorEntry(name: string, tensor: Tensor): TensorEntry {
  const dtype = FILE_DTYPE[tensor.dtype];
  return { name, dtype, shape: tensor.shape, bytes: () => bytesOf(tensor) };
}

/** The elements of a tensor as they are stored. */
export async function bytesOf(tensor: Tensor): Promise<Uint8Array> {
  return new Uint8Array(await tensor.device.readBytes(tensor)).subarray(
    0, tensor.size * bytesPerElement(FILE_DTYPE[tensor.dtype]));
}

/** Names of dtypes in files. */
export const FILE_DTYPE = { f32: "F32", bf16: "BF16", f16: "F16", i32: "I32", u32: "U32" } as const;

/** A parameter as it is stored. */
export interface StoredParameter {
  readonly dtype: keyof typeof FILE_DTYPE;
  bytes(): Promise<Uint8Array>;
}

/**
 * The model's parameters under their published names, one tensor per expert.
 * @throws UsageError for a model with quantised weights.
 */
export function parameterEntries(model: NemotronH): TensorEntry[] {
  const [quantised] = model.quantised;
  if (quantised) {
    throw new UsageError(`A checkpoint holds f32 weights, but ${quantised[0]} is ${quantised[1].format}.`);
  }
  return entriesOf(model.config, ({ name }) => {
    const tensor = model.parameters.get(name)!;
    return { dtype: tensor.dtype, bytes: () => bytesOf(tensor) };
  });
}

function entriesOf(
  config: NemotronHConfig, stored: (parameter: Parameter) => StoredParameter,
): TensorEntry[] {
  return listParameters(config).flatMap((parameter) => {
    const { dtype: held, bytes } = stored(parameter);
    const dtype = FILE_DTYPE[held];
    if (parameter.kind !== "expert") return [{ name: parameter.name, dtype, shape: parameter.shape, bytes }];
    // The experts of one parameter come in order, and are read back once.
    let stacked: Promise<Uint8Array> | null = null;
    return tensorsOf(parameter).map(({ name, shape, expert }): TensorEntry => ({
      name, dtype, shape,
      bytes: async () => {
        stacked ??= bytes();
        const size = sizeOf(shape) * bytesPerElement(dtype);
        return (await stacked).subarray(expert! * size, (expert! + 1) * size);
      },
    }));
  });
}

/** config.json and model.safetensors. */
export function modelFiles(model: NemotronH): Record<string, string | AsyncIterable<Uint8Array>> {
  return filesOf(model.config, parameterEntries(model));
}

/** The same from parameters that lie elsewhere. */
export function storedFiles(
  config: NemotronHConfig, stored: (parameter: Parameter) => StoredParameter,
): Record<string, string | AsyncIterable<Uint8Array>> {
  return filesOf(config, entriesOf(config, stored));
}

function filesOf(
  config: NemotronHConfig, entries: readonly TensorEntry[],
): Record<string, string | AsyncIterable<Uint8Array>> {
  return {
    "config.json": serialiseConfig(config),
    "model.safetensors": safetensorsPieces([...entries], { format: "pt" }),
  };
}

/** Outputs by name, with the gradients of stacked experts taken apart as checkpoints name them. */
export function gradientEntries(config: NemotronHConfig, outputs: Outputs): [string, HostArray][] {
  const experts = new Map(
    listParameters(config).filter(({ kind }) => kind === "expert").map((p) => [p.name, p]));
  return [...outputs].flatMap(([name, array]): [string, HostArray][] => {
    const [, prefix, parameter] = /^((?:mtp\.)?grad\.)(.*)$/.exec(name) ?? [];
    const stacked = parameter === undefined ? undefined : experts.get(parameter);
    if (!stacked) return [[name, array]];
    return tensorsOf(stacked).map((tensor) => {
      const size = sizeOf(tensor.shape);
      return [prefix! + tensor.name, {
        dtype: array.dtype, shape: tensor.shape,
        data: array.data.subarray(tensor.expert! * size, (tensor.expert! + 1) * size),
      }];
    });
  });
}
