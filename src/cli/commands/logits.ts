import { writeFileSync, renameSync } from "node:fs";
import { openFile } from "../../io/files.node.ts";
import { encodeSafetensors, openSafetensors, type TensorReader } from "../../io/safetensors.ts";
import { gradientEntries } from "../../models/checkpoint.ts";
import { evaluate, evaluateIncremental, type EvaluateInputs } from "../../models/evaluate.ts";
import { KV_FORMATS } from "../../models/nemotron_h.ts";
import { openDevice } from "../../tensor/device.ts";
import { FormatError, UsageError } from "../../tensor/errors.ts";
import { defineCommand } from "../args.ts";
import { openModel } from "../models.ts";

export const logits = defineCommand({
  name: "logits",
  summary: "Compute a checkpoint's logits, losses and gradients for given tokens.",
  description:
    "Reads input_ids (batch, seqlen) and, where present, labels, attention_mask and cu_seqlens. Writes " +
    "logits and loss; with --grads grad.NAME for every parameter; with --decode K decode.logits, K tokens " +
    "prefilled and the rest one by one; for models with an MTP head mtp.logits, mtp.loss and mtp.grad.NAME.",
  options: {
    model: { type: "string", value: "DIR", required: true, help: "A checkpoint folder." },
    input: { type: "string", value: "FILE", required: true, help: "A safetensors file with the inputs." },
    out: { type: "string", value: "FILE", required: true, help: "The safetensors file to write." },
    grads: { type: "boolean", help: "Gradients of the losses with respect to every parameter." },
    decode: {
      type: "integer", min: 1, value: "K", help: "Also run with caches: K tokens at once, then one by one.",
    },
    kvCache: {
      type: "string", choices: KV_FORMATS,
      help: "How --decode keeps keys and values; default: fp8 for a checkpoint with scales for it, else f32.",
    },
    dtMinClamp: {
      type: "boolean",
      help: "Keep the step size at or above time_step_min, as one published implementation does.",
    },
    adapter: {
      type: "string", value: "NAME", help: "Part of an adapter's name; default: the best one found.",
    },
    json: { type: "boolean", help: "Print a JSON summary instead of a line." },
  },
  examples: ["krait logits --model DIR --input in.safetensors --out out.safetensors --grads"],
  async run({ options, stdout }) {
    const source = await openFile(options.input);
    if (!source) throw new UsageError(`The input file ${options.input} does not exist.`);
    const reader = await openSafetensors(source);
    const inputs = await readInputs(reader, options.input);
    await reader.close();
    const device = await openDevice(options.adapter ? { adapter: options.adapter } : {});
    try {
      const { model } = await openModel(device, options.model, {
        dt_min_clamp: options.dtMinClamp, trainable: options.grads,
      });
      const outputs = await evaluate(model, inputs, { grads: options.grads });
      if (options.decode !== undefined) {
        const { batch, seqlen } = inputs;
        if (options.decode > seqlen) {
          throw new UsageError(
            `--decode must be at most the ${seqlen} tokens of a row, found ${options.decode}.`);
        }
        const { logits: data } = await evaluateIncremental(
          model, inputs, [options.decode], options.kvCache);
        outputs.set("decode.logits", { dtype: "F32", shape: [batch, seqlen, model.config.vocab_size], data });
      }
      const entries = gradientEntries(model.config, outputs).map(([name, { dtype, shape, data }]) =>
        ({ name, dtype, shape, bytes: new Uint8Array(data.buffer, data.byteOffset, data.byteLength) }));
      writeFileSync(`${options.out}.tmp`, await encodeSafetensors(entries));
      renameSync(`${options.out}.tmp`, options.out);
      const loss = outputs.get("loss")?.data[0];
      const summary = {
        out: options.out, tensors: entries.length, loss: loss ?? null, adapter: device.info.id,
      };
      stdout.write(options.json ? `${JSON.stringify(summary)}\n`
        : `${entries.length} tensors written to ${options.out}` +
          `${loss === undefined ? "" : `; loss ${loss.toFixed(6)}`}\n`);
    } finally {
      device.destroy();
    }
  },
});

async function readInputs(reader: TensorReader, file: string): Promise<EvaluateInputs> {
  const shape = reader.tensors.get("input_ids")?.shape;
  if (!shape) {
    throw new FormatError(
      `${file} must hold a tensor input_ids, found ${[...reader.tensors.keys()].join(", ") || "none"}.`);
  }
  if (shape.length !== 2 || shape.includes(0)) {
    throw new FormatError(
      `${file}: input_ids must have shape [batch, seqlen], both at least 1, found [${shape}].`);
  }
  const [batch, seqlen] = shape as [number, number];
  const optional = async (name: string, expected: readonly number[]) => {
    const found = reader.tensors.get(name)?.shape;
    if (!found) return undefined;
    if (expected.length > 0 && found.join() !== expected.join()) {
      throw new FormatError(
        `${file}: ${name} must have shape [${expected}] like input_ids, found [${found}].`);
    }
    return reader.readTensorI32(name);
  };
  return {
    batch, seqlen,
    input_ids: await reader.readTensorI32("input_ids"), labels: await optional("labels", shape),
    attention_mask: await optional("attention_mask", shape), cu_seqlens: await optional("cu_seqlens", []),
  };
}

