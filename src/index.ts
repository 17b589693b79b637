/** Krait's public API. */
export { chooseAdapter, type AdapterHandle, type AdapterInfo, type AdapterKind } from "./gpu/adapters.ts";
export {
  AdapterError, DeviceLostError, GpuError, OutOfMemoryError, RankLostError, ShaderError,
} from "./gpu/errors.ts";
export type { GraphMemory } from "./gpu/pool.ts";
export type { Profiler, ProfileEvent } from "./gpu/profiler.ts";
export {
  BLOCK_LAYOUTS, BlockTensor, isBlockFormat, type BlockFormat, type RawBlocks,
} from "./tensor/blocks.ts";
export { Device, listAdapters, openDevice, type DeviceOptions } from "./tensor/device.ts";
export { ConfigError, DTypeError, FormatError, KraitError, ShapeError, UsageError } from "./tensor/errors.ts";
export {
  dequantizeScaled, ELEMENTS, encodeStochastic, quantizeScaled, SCALED_FORMATS, type ElementFormat,
  type Scaled, type ScaledFormat, type ScaledOptions,
} from "./tensor/formats.ts";
export { ndarray, sizeOf, type NdArray } from "./tensor/ndarray.ts";
export { scope, unscoped } from "./tensor/scope.ts";
export { Tensor, type TensorDType } from "./tensor/tensor.ts";
export * as ops from "./ops/index.ts";
export { noGrad } from "./ops/op.ts";
export { Tape, type GradientMap } from "./autograd/tape.ts";
export { parseConfig, serialiseConfig, type NemotronHConfig } from "./models/config.ts";
export { preset, presetNames } from "./models/presets.ts";
export { countParameters, layerStrip, memoryToRun, memoryToTrain, stateBytes } from "./models/accounting.ts";
export {
  createParameters, createWeights, uploadWeights, WEIGHT_FORMATS, type WeightFormat,
} from "./models/parameters.ts";
export { loadModel, modelFiles, parameterEntries } from "./models/checkpoint.ts";
export { NemotronH, type Loss, type ModelCache, type TrainingBatch } from "./models/nemotron_h.ts";
export { evaluate, evaluateIncremental, type EvaluateInputs, type Outputs } from "./models/evaluate.ts";
export { encodeSafetensors, openSafetensors, openTensors } from "./io/safetensors.ts";
export { byteTokenizer } from "./text/byte_tokenizer.ts";
export type { Tokenizer } from "./text/tokenizer.ts";
export { openRankDevices, type RanksOn } from "./parallel/rank_devices.ts";
export { splitDocuments, type Document } from "./train/data.ts";
export { lossCurve, movingAverage, niceTicks, type CurveOptions, type CurvePoint } from "./train/curve.ts";
export { ngramBaselines } from "./train/ngram.ts";
export { BatchPacker, bitsPerByte, tokenizeDocuments } from "./train/packing.ts";
export { makeRecipe, type Recipe } from "./train/recipe.ts";
export { TrainingRun, type RunStep } from "./train/run.ts";
export { Trainer, type StepMetrics } from "./train/trainer.ts";
export { AdamW } from "./train/optimizer.ts";
export { Generator, type GenerateOptions } from "./infer/engine.ts";
export { generateText } from "./infer/text.ts";
export type { Sampling } from "./infer/sampling.ts";
export { KraitWorker, WorkerError } from "./worker/client.ts";
export type {
  AdapterSummary, CheckpointFiles, Failure, Phase, TrainingEvent, TrainOptions, TrainResult, WriteOptions,
    WriteResult,
} from "./worker/protocol.ts";
