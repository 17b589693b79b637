/**
 * A model's answers on given tokens: logits, losses, gradients, caches, router decisions,
 * under the usual names.
 */
import { Tape } from "../autograd/tape.ts";
import type { Routing } from "../nn/context.ts";
import { linear_cross_entropy } from "../ops/linear_cross_entropy.ts";
import { denseWeight } from "../ops/quantize.ts";
import { decodeFloat32 } from "../tensor/dtype.ts";
import { FormatError } from "../tensor/errors.ts";
import { scope } from "../tensor/scope.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { disposeCache, type KVFormat, type ModelCache, type NemotronH, stepContext } from "./nemotron_h.ts";

/** Integer inputs, row-major (batch, seqlen). */
export interface EvaluateInputs {
  readonly batch: number;
  readonly seqlen: number;
  readonly input_ids: Int32Array;
  /** Not shifted: position t is scored against labels[t + 1]; -100 is not scored. */
  readonly labels?: Int32Array | undefined;
  /** 0 = padding. Padding is kept apart like a document of its own. */
  readonly attention_mask?: Int32Array | undefined;
  /** Document bounds within a single row: 0, ..., seqlen. */
  readonly cu_seqlens?: Int32Array | undefined;
}

export interface EvaluateOptions {
  /** Gradients of the loss, and of the MTP loss, with respect to every parameter. */
  readonly grads?: boolean;
  /** Hidden states before every block, and router decisions. */
  readonly internals?: boolean;
}

export interface HostArray {
  readonly dtype: "F32" | "I32";
  readonly shape: readonly number[];
  readonly data: Float32Array | Int32Array;
}

export type Outputs = Map<string, HostArray>;

const IGNORED = -100;

/**
 * logits, loss; mtp.logits, mtp.loss and, at depth 2, mtp.logits_depth2, mtp.loss_depth2; with `grads`
 * grad.NAME and mtp.grad.NAME by parameter name.
 * @throws FormatError for inputs that do not fit together or a token outside the vocabulary.
 */
export async function evaluate(
  model: NemotronH, inputs: EvaluateInputs, options: EvaluateOptions = {},
): Promise<Outputs> {
  const { batch: B, seqlen: L, input_ids, labels } = inputs;
  const { device, config: { hidden_size: D, vocab_size: V } } = model;
  checkInputs(inputs, V);
  const outputs: Outputs = new Map();
  const upload = (values: Int32Array) => device.tensor(values, [B, L]);
  const documents = documentsOf(inputs);
  const pending: { name: string; shape: readonly number[]; tensor: Tensor; integer?: boolean }[] = [];
  const take = (name: string, tensor: Tensor, shape = tensor.shape, integer = false) =>
    pending.push({ name, shape, tensor: tensor.retain(), integer });

  const evaluatePart = (part: string, tape: Tape) => {
    const seq_idx = documents && upload(documents);
    const routing: Routing[] = [];
    const context = { seq_idx, step: null, routing };
    const loss = (h: Tensor, depth: number) =>
      linear_cross_entropy(h.reshape([B * L, D]), denseWeight(model.lm_head),
        device.tensor(shifted(labels!, inputs, documents, depth), [B * L]), {});
    const minimised = tape.run(() => {
      const h = model.hidden(upload(input_ids), context, null, (x, i) => {
        if (options.internals && part === "loss") take(`hidden_states.${i}`, x);
      });
      if (part === "loss") {
        take("logits", model.logits(h));
        if (options.internals) take("hidden_states.final", h);
        return labels && loss(h, 1);
      }
      const next = upload(nextTokens(inputs, 1));
      const m = model.mtpHidden(h, next, context);
      const logits = model.logits(m);
      take("mtp.logits", logits, [B, L - 1, V]);
      if (options.internals) take("mtp.hidden", m, [B, L - 1, D]);
      const first = loss(m, 2);
      if (L > 2) {
        const m2 = model.mtpHidden(m, upload(nextTokens(inputs, 2)), { ...context, routing: null });
        take("mtp.logits_depth2", model.logits(m2), [B, L - 2, V]);
        take("mtp.loss_depth2", loss(m2, 3));
      }
      return first;
    });
    const prefix = part === "loss" ? "" : "mtp.";
    if (minimised) take(`${prefix}loss`, minimised);
    if (minimised && options.grads) {
      const gradients = tape.backward([minimised], [device.tensor([1], [])]);
      try {
        for (const [name, parameter] of model.parameters) {
          if (!parameter.requiresGrad) continue;
          take(
            `${prefix}grad.${name}`, gradients.get(parameter.key) ?? device.zeros(parameter.shape),
            parameter.shape);
        }
      } finally {
        for (const gradient of gradients.values()) gradient.release();
      }
    }
    if (options.internals) {
      for (const { layer, logits, weight, index } of routing) {
        const isMtp = layer.startsWith("mtp");
        if (isMtp !== (part === "mtp")) continue;
        const at = layer.replace(/^(backbone|mtp)\.layers\.(\d+).*$/, isMtp ? "router.mtp.$2" : "router.$2");
        take(`${at}.logits`, logits);
        take(`${at}.topk_weights`, weight);
        take(`${at}.topk_indices`, index, index.shape, true);
      }
    }
  };
  try {
    for (const part of labels && model.mtp ? ["loss", "mtp"] : ["loss"]) {
      const tape = new Tape();
      try {
        scope(() => evaluatePart(part, tape));
      } finally {
        tape.dispose();
      }
    }
    for (const { name, shape, tensor, integer } of pending) {
      const values = await tensor.read();
      const data = integer ? Int32Array.from(values) : values as Float32Array;
      outputs.set(name, { dtype: integer ? "I32" : "F32", shape, data: cropped(data, tensor.shape, shape) });
    }
    return outputs;
  } finally {
    for (const { tensor } of pending) tensor.release();
  }
}

/**
 * Logits of an incremental run with caches: pieces of the given lengths, and the rest one token at a time.
 * @returns (batch, seqlen, vocabulary) logits and, by name, the caches afterwards
 */
export async function evaluateIncremental(
  model: NemotronH, inputs: EvaluateInputs, pieces: readonly number[], kv: KVFormat = model.kvFormat,
): Promise<{ logits: Float32Array; caches: Outputs }> {
  const { batch: B, seqlen: L, input_ids } = inputs;
  const { device, config: { vocab_size: V } } = model;
  checkInputs(inputs, V);
  if (inputs.attention_mask || inputs.cu_seqlens) {
    throw new FormatError("An incremental run takes rows without padding and without document bounds.");
  }
  const logits = new Float32Array(B * L * V);
  const lengths = [...pieces];
  for (let done = pieces.reduce((a, b) => a + b, 0); done < L; done++) lengths.push(1);
  const cache = model.createCache(B, L, kv);
  try {
    for (const [i, length] of lengths.entries()) {
      const from = cache.length;
      const ids = new Int32Array(B * length);
      for (let b = 0; b < B; b++) {
        ids.set(input_ids.subarray(b * L + from, b * L + from + length), b * length);
      }
      cache.position.write(Uint32Array.from([from]));
      const piece = scope(() => {
        const context = stepContext(cache, { decode: length === 1 && i >= pieces.length });
        return model.logits(model.hidden(device.tensor(ids, [B, length]), context, cache));
      });
      cache.length += length;
      const values = await piece.read().finally(() => piece.dispose()) as Float32Array;
      for (let b = 0; b < B; b++) {
        logits.set(values.subarray(b * length * V, (b + 1) * length * V), (b * L + from) * V);
      }
    }
    return { logits, caches: await readCaches(cache) };
  } finally {
    disposeCache(cache);
  }
}

async function readCaches(cache: ModelCache): Promise<Outputs> {
  const outputs: Outputs = new Map();
  for (const [i, layer] of cache.layers.entries()) {
    if (!layer) continue;
    const tensors = layer.kind === "mamba2"
      ? { conv_state: layer.conv_state, ssm_state: layer.ssm_state } : { key: layer.key, value: layer.value };
    for (const [name, tensor] of Object.entries(tensors)) {
      const coded = layer.kind === "kv" && layer.scales;
      const scale = coded ? coded[name as "key" | "value"] : null;
      outputs.set(`cache.${i}.${name}`, {
        dtype: "F32", shape: scale === null ? tensor.shape : [...tensor.shape.slice(0, 3),
          4 * tensor.shape[3]!],
        data: scale === null ? await tensor.read() as Float32Array
          : decodeFloat32("F8_E4M3", bytesOf(await tensor.read() as Uint32Array)).map((x) => x * scale),
      });
    }
  }
  return outputs;
}

function bytesOf({ buffer, byteOffset, byteLength }: Uint32Array): Uint8Array {
  return new Uint8Array(buffer, byteOffset, byteLength);
}

function checkInputs(inputs: EvaluateInputs, vocab: number): void {
  const { batch: B, seqlen: L } = inputs;
  for (const name of ["input_ids", "labels", "attention_mask"] as const) {
    const values = inputs[name];
    if (values && values.length !== B * L) {
      throw new FormatError(`${name} must hold ${B} x ${L} values like input_ids, found ${values.length}.`);
    }
  }
  inputs.input_ids.forEach((id, i) => {
    if (id < 0 || id >= vocab) {
      throw new FormatError(
        `input_ids[${Math.floor(i / L)}, ${i % L}] must be from 0 to ${vocab - 1} (the vocabulary), ` +
        `found ${id}.`);
    }
  });
  inputs.labels?.forEach((label, i) => {
    if (label !== IGNORED && (label < 0 || label >= vocab)) {
      throw new FormatError(
        `labels[${Math.floor(i / L)}, ${i % L}] must be ${IGNORED} or from 0 to ${vocab - 1}, ` +
        `found ${label}.`);
    }
  });
  const bounds = inputs.cu_seqlens;
  const rising = bounds?.every((bound, i) => i === 0 || bound >= bounds[i - 1]!);
  if (bounds && (B !== 1 || bounds[0] !== 0 || bounds.at(-1) !== L || !rising)) {
    throw new FormatError(
      `cu_seqlens must rise from 0 to ${L} for a single row, found [${Array.from(bounds)}] for ${B} rows.`);
  }
}

/**
 * Document number of every position; padding counts as documents of its own.
 * Null where rows are whole documents.
 */
function documentsOf({ batch, seqlen, attention_mask, cu_seqlens }: EvaluateInputs): Int32Array | null {
  if (!attention_mask && !cu_seqlens) return null;
  const documents = new Int32Array(batch * seqlen);
  for (let b = 0; b < batch; b++) {
    let document = 0;
    for (let t = 0; t < seqlen; t++) {
      const i = b * seqlen + t;
      const bound = cu_seqlens?.includes(t) && t > 0;
      const maskChange = attention_mask && t > 0 && attention_mask[i] !== attention_mask[i - 1];
      if (bound || maskChange) document++;
      documents[i] = document;
    }
  }
  return documents;
}

/** Targets of a prediction `depth` tokens ahead; -100 beyond the row and the document. */
function shifted(
  labels: Int32Array, { batch, seqlen, cu_seqlens }: EvaluateInputs, documents: Int32Array | null,
  depth: number,
): Int32Array {
  const targets = new Int32Array(batch * seqlen).fill(IGNORED);
  for (let b = 0; b < batch; b++) {
    for (let t = 0; t + depth < seqlen; t++) {
      const i = b * seqlen + t;
      const crosses = depth > 1 && cu_seqlens && documents && documents[i] !== documents[i + depth];
      if (!crosses) targets[i] = labels[i + depth]!;
    }
  }
  return targets;
}

/** The token `depth` places on; 0 beyond the row, where nothing is scored. */
function nextTokens({ batch, seqlen, input_ids }: EvaluateInputs, depth: number): Int32Array {
  const ids = new Int32Array(batch * seqlen);
  for (let b = 0; b < batch; b++) {
    ids.set(input_ids.subarray(b * seqlen + depth, (b + 1) * seqlen), b * seqlen);
  }
  return ids;
}

/**
 * The leading positions of every row: from (B, L, ...) to (B, L', ...) or, for routers, from (B * L, ...).
 */
function cropped<A extends Float32Array | Int32Array>(
  data: A, from: readonly number[], to: readonly number[],
): A {
  if (from.join() === to.join() || from.length !== to.length || from.length < 3) return data;
  const [B, L] = from as [number, number];
  const width = data.length / (B * L);
  const length = to[1]!;
  const out = new (data.constructor as new (n: number) => A)(B * length * width);
  for (let b = 0; b < B; b++) {
    out.set(data.subarray(b * L * width, (b * L + length) * width), b * length * width);
  }
  return out;
}
