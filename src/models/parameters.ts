/**
 * Initial weights. Every parameter has a random stream of its own,
 * so that a seed means the same weights everywhere.
 */
import { OutOfMemoryError } from "../gpu/errors.ts";
import type { CodedFormat } from "../io/quantized.ts";
import type { Weight } from "../nn/weights.ts";
import { cast } from "../ops/cast.ts";
import { quantize } from "../ops/quantize.ts";
import {
  bitsPerValue, BLOCK_LAYOUTS, type BlockFormat, blockScaleShape, BlockTensor, codeWords,
} from "../tensor/blocks.ts";
import type { Device } from "../tensor/device.ts";
import { ConfigError } from "../tensor/errors.ts";
import { sizeOf } from "../tensor/ndarray.ts";
import { fillNormal, fillUniform, type RandomKey } from "../tensor/philox.ts";
import { scope, unscoped } from "../tensor/scope.ts";
import { storageBytes, type Tensor, type TensorDType } from "../tensor/tensor.ts";
import { together } from "../tensor/together.ts";
import { type Parameter, type ParameterKind, listParameters } from "./checkpoint_names.ts";
import type { NemotronHConfig } from "./config.ts";

/**
 * How a model that only runs holds its matrices. fp8 is E4M3 with a scale per row, mxfp8 E4M3 with a power of
 * two for 32 neighbours.
 */
export const WEIGHT_FORMATS = ["f32", "f16", "bf16", "q8", "q4", "fp8", "mxfp8", "mxfp4", "nvfp4"] as const;
export type WeightFormat = (typeof WEIGHT_FORMATS)[number];
/** How a model that is trained holds them. */
export type TrainedFormat = "f32" | "bf16";

const BLOCKS: Readonly<Partial<Record<WeightFormat, BlockFormat>>> = {
  q8: "q8", q4: "q4", fp8: "fp8_e4m3", mxfp8: "mxfp8_e4m3", mxfp4: "mxfp4", nvfp4: "nvfp4",
};

/** The format of codes and scales that a weight format stands for; undefined for dense ones. */
export function blockFormatOf(weights: WeightFormat): BlockFormat | undefined {
  return BLOCKS[weights];
}

/** Formats of the parameters that keep the codes and scales of a checkpoint, by name. */
export type KeptFormats = ReadonlyMap<string, CodedFormat>;

/** Whether a parameter may be held as codes and scales of a format. */
export function canBeCoded({ kind, shape }: Parameter, format: CodedFormat): boolean {
  return MATRICES.has(kind) && shape.at(-1)! % BLOCK_LAYOUTS[format].block === 0;
}

/**
 * Checks that every parameter can be bound on the device, before anything is drawn or read.
 * @param weights the format of matrices; those in `kept` have another
 * @throws OutOfMemoryError naming the first parameter that is too large.
 */
export function checkFits(
  device: Device, config: NemotronHConfig, weights: WeightFormat = "f32", kept: KeptFormats = new Map(),
): void {
  const { maxBufferSize, maxStorageBufferBindingSize } = device.gpuDevice.limits;
  const most = Math.min(maxBufferSize, maxStorageBufferBindingSize);
  const list = listParameters(config);
  for (const { name, shape } of list) {
    const stored = kept.get(name);
    const bytes = stored ? 4 * codeWords(sizeOf(shape), stored) : 4 * sizeOf(shape);
    if (bytes <= most) continue;
    throw new OutOfMemoryError(
      `The model is larger than the device: ${name} [${shape.join(", ")}] takes ${bytes} bytes in ` +
      `${stored ?? "f32"}, but ${device.info.id} binds at most ${most}.`, bytes, most);
  }
  const total = list.reduce((sum, parameter) => {
    const format = formatOf(parameter, weights);
    const size = sizeOf(parameter.shape);
    const blocks = kept.get(parameter.name) ?? blockFormatOf(format);
    return sum + (blocks ? (size * bitsPerValue(blocks)) / 8 : storageBytes(size, format as TensorDType));
  }, 0);
  if (total > device.pool.ceilingBytes) {
    throw new OutOfMemoryError(
      `The model is larger than the device: its parameters take ${total} bytes in ${weights}, but the ` +
      `memory pool may hold at most ${device.pool.ceilingBytes}.`, total, device.pool.ceilingBytes);
  }
}

/**
 * Draws all parameters of a model (Nemotron-H report, section 2; Mamba-2 reference for the state space):
 * normal weights of deviation `initializer_range`, those that write into the residual stream divided by
 * sqrt(layers); conv weights uniform in 1/sqrt(window); A in 1..16; steps log-uniform between time_step_min
 * and time_step_max; D and norms 1; biases 0.
 * @param weights  of matrices of products; everything else is f32
 * @returns by canonical name; trainable ones require a gradient
 * @throws OutOfMemoryError when the model is larger than the device
 */
export function createParameters(
  device: Device, config: NemotronHConfig, seed: number, weights: TrainedFormat = "f32",
): Map<string, Tensor> {
  checkFits(device, config, weights);
  return unscoped(() => {
    const parameters = trainableParameters(device, config, weights);
    listParameters(config).forEach((parameter, i) => {
      parameters.get(parameter.name)!.write(initialValues(config, parameter, { seed, stream: i, step: 0 }));
    });
    return parameters;
  });
}

/**
 * All parameters of a model, of any contents, by canonical name. Those that are trained lie side by side, so
 * that one launch updates all of them; matrices in bf16 apart from the rest.
 */
export function trainableParameters(
  device: Device, config: NemotronHConfig, weights: TrainedFormat = "f32",
): Map<string, Tensor> {
  const list = listParameters(config);
  const trained = new Map((["f32", "bf16"] as const).map((format) => {
    const members = list.filter((parameter) =>
      parameter.trainable && formatOf(parameter, weights) === format);
    return [format as WeightFormat, together(device, members.map(({ shape }) => shape), format).values()];
  }));
  return new Map(list.map((parameter) => {
    const { name, shape, trainable } = parameter;
    const tensor = trainable
      ? trained.get(formatOf(parameter, weights))!.next().value!
      : device.empty(shape);
    tensor.requiresGrad = trainable;
    return [name, tensor];
  }));
}

/** The same draws for a model that only runs, with its matrices in a format: see `storeParameter`. */
export function createWeights(
  device: Device, config: NemotronHConfig, seed: number, weights: WeightFormat,
): Map<string, Weight> {
  checkFits(device, config, weights);
  return unscoped(() => new Map(listParameters(config).map((parameter, i) => [
    parameter.name,
    storeParameter(
      device, parameter, initialValues(config, parameter, { seed, stream: i, step: 0 }), weights),
  ])));
}

/**
 * Given values for every parameter, by canonical name, for a model that only runs: see `storeParameter`.
 * @throws ConfigError when one is missing.
 */
export function uploadWeights(
  device: Device, config: NemotronHConfig, values: ReadonlyMap<string, Float32Array>, weights: WeightFormat,
): Map<string, Weight> {
  checkFits(device, config, weights);
  return unscoped(() => new Map(listParameters(config).map((parameter) => {
    const given = values.get(parameter.name);
    if (!given) throw new ConfigError(
      `The model needs a parameter ${parameter.name}, but no values were given.`);
    return [parameter.name, storeParameter(device, parameter, given, weights)];
  })));
}

/**
 * Puts a parameter on the device in a format: matrices of products and tables of tokens. Norms, biases,
 * convolutions, the state space and the router stay f32, and so do matrices whose rows are not whole blocks
 * of the format. The f32 values of a matrix in another format are on the device only until it is made.
 */
export function storeParameter(
  device: Device, parameter: Parameter, values: Float32Array, weights: WeightFormat,
): Weight {
  const format = formatOf(parameter, weights);
  if (format === "f32") return device.tensor(values, parameter.shape);
  return scope((): Weight => {
    const tensor = device.tensor(values, parameter.shape);
    return converted(tensor, format);
  });
}

/**
 * Every parameter in its format, of any contents: for going through a model's motions (`device.rehearse`).
 */
export function emptyWeights(
  device: Device, config: NemotronHConfig, weights: WeightFormat = "f32", kept: KeptFormats = new Map(),
): Map<string, Weight> {
  return new Map(listParameters(config).map((parameter): [string, Weight] => {
    const stored = kept.get(parameter.name);
    if (stored) return [parameter.name, emptyBlocks(device, parameter.shape, stored)];
    const format = formatOf(parameter, weights);
    const tensor = device.empty(parameter.shape);
    if (format === "f32") return [parameter.name, tensor];
    return [parameter.name, converted(tensor, format)];
  }));
}

function emptyBlocks(device: Device, shape: readonly number[], format: CodedFormat): BlockTensor {
  const { global, scale } = BLOCK_LAYOUTS[format];
  return scope(() => {
    const codes = device.empty([...shape.slice(0, -1), codeWords(shape.at(-1)!, format)], "u32");
    const scales = device.empty(blockScaleShape(shape, format), scale === "bytes" ? "u32" : "f32");
    return new BlockTensor(
      shape, format, codes.retain(), scales.retain(), global ? device.empty([1]).retain() : null);
  });
}

function converted(tensor: Tensor, format: WeightFormat): Tensor | BlockTensor {
  const blocks = blockFormatOf(format);
  if (!blocks) return cast(tensor, format as TensorDType);
  return quantize(tensor, blocks, {
    ...(format === "fp8" ? { perRow: true } : {}), ...(format === "mxfp8" ? { scaleRule: "ceil" } : {}),
  });
}

/** The format in which a parameter that is trained is stored. */
export function trainedFormatOf(parameter: Parameter, weights: TrainedFormat): TrainedFormat {
  return parameter.trainable ? formatOf(parameter, weights) as TrainedFormat : "f32";
}

/** The format in which a parameter is stored. */
function formatOf({ kind, shape }: Parameter, weights: WeightFormat): WeightFormat {
  if (!MATRICES.has(kind)) return "f32";
  // Rows of a table are not read from halves.
  const blocks = blockFormatOf(weights);
  if (!blocks) return kind === "embedding" ? "f32" : weights;
  // Tables of tokens lose more by four bits than they save.
  const isTable = kind === "embedding" || kind === "head";
  const format = isTable && BLOCK_LAYOUTS[blocks].bits === 4 ? "q8" : weights;
  return shape.at(-1)! % BLOCK_LAYOUTS[blockFormatOf(format)!].block === 0 ? format : "f32";
}

const MATRICES: ReadonlySet<ParameterKind> = new Set([
  "embedding", "head", "expert", "mamba_linear", "attention_linear", "mlp_linear", "shared_linear",
    "latent_linear",
  "mtp_linear",
]);

/** What a parameter is at first. */
export function initialValues(
  config: NemotronHConfig, { name, kind, shape }: Parameter, key: RandomKey,
): Float32Array {
  const values = new Float32Array(sizeOf(shape));
  const uniform = (low: number, high: number) => fillUniform(key, values).map((u) => low + (high - low) * u);
  switch (kind) {
    case "norm":
      return values.fill(1);
    case "router_bias":
      return values;
    case "conv":
      return uniform(-1 / Math.sqrt(config.conv_kernel), 1 / Math.sqrt(config.conv_kernel));
    case "bias":
      return name.endsWith("conv1d.bias")
        ? uniform(-1 / Math.sqrt(config.conv_kernel), 1 / Math.sqrt(config.conv_kernel)) : values;
    case "ssm": {
      if (name.endsWith(".D")) return values.fill(1);
      if (name.endsWith(".A_log")) return uniform(1, 16).map(Math.log);
      const { time_step_min, time_step_max, time_step_floor } = config;
      // The inverse of softplus, so that a step starts at the drawn value.
      return uniform(Math.log(time_step_min), Math.log(time_step_max)).map((log) => {
        const dt = Math.max(Math.exp(log), time_step_floor);
        return dt + Math.log(-Math.expm1(-dt));
      });
    }
    default: {
      const writes = /(?:out_proj|o_proj|down_proj|fc2_latent_proj)(?:\.weight)?$/.test(name);
      const layers = config.num_hidden_layers;
      const deviation =
        config.initializer_range / (writes && config.rescale_prenorm_residual ? Math.sqrt(layers) : 1);
      return fillNormal(key, values).map((x) => deviation * x);
    }
  }
}
