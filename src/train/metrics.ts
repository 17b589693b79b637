/**
 * The record of a run: `metrics.jsonl`, one JSON object per line. The types and the text form are here and
 * run anywhere; `metrics.node.ts` keeps the file.
 */
import { FormatError } from "../tensor/errors.ts";

export type MetricValue = number | string | boolean | null | readonly number[];

/**
 * One line. Further fields are allowed; names are snake_case and units are in the name where they are not
 * obvious.
 */
export interface MetricRecord {
  /** Finished optimiser steps when the line was written; 0 is before training. */
  readonly step: number;
  /** Mean training loss of the step, in nats per scored token. */
  readonly loss?: number;
  /** Mean loss over the validation data, in nats per scored token. */
  readonly val_loss?: number;
  readonly val_bits_per_byte?: number;
  /** Learning rate of the step. */
  readonly lr?: number;
  /** Norm of all gradients before clipping. */
  readonly grad_norm?: number;
  /** Tokens seen since the first step. */
  readonly tokens?: number;
  readonly tokens_per_s?: number;
  /** Seconds of training since the first step, pauses left out. */
  readonly seconds?: number;
  readonly [name: string]: MetricValue | undefined;
}

/** JSON has no words for these, and a loss that is not finite is the last thing to drop from a record. */
const NOT_FINITE = new Map<unknown, number>([["NaN", NaN], ["Infinity", Infinity], ["-Infinity", -Infinity]]);

/**
 * Writes a record as one line, with its line end. NaN and the infinities become the strings "NaN",
 * "Infinity", "-Infinity".
 */
export function formatMetric(record: MetricRecord): string {
  const text = JSON.stringify(record, (_, value: unknown) => {
    return typeof value === "number" && !Number.isFinite(value) ? String(value) : value;
  });
  return `${text}\n`;
}

/**
 * Reads the lines that `formatMetric` wrote. A last line without a line end is what a crash leaves behind and
 * is passed over.
 *
 * @throws FormatError  naming `name` and the line, when a line is not an object with a whole `step`
 */
export function parseMetrics(content: string, name = "metrics.jsonl"): MetricRecord[] {
  const lines = content.split("\n");
  lines.pop();
  return lines.flatMap((line, index) => {
    return line.trim() === "" ? [] : [parseLine(line, `${name} line ${index + 1}`)];
  });
}

function parseLine(line: string, where: string): MetricRecord {
  let value: unknown;
  try {
    value = JSON.parse(line, (key, item: unknown) => (key === "" ? item : NOT_FINITE.get(item) ?? item));
  } catch {
    throw new FormatError(`${where}: expected a JSON object, found ${JSON.stringify(line.slice(0, 40))}.`);
  }
  if (!isRecord(value)) {
    throw new FormatError(`${where}: expected an object with a whole "step", found ${line.slice(0, 40)}.`);
  }
  return value;
}

function isRecord(value: unknown): value is MetricRecord {
  return typeof value === "object" && value !== null && "step" in value && Number.isSafeInteger(value.step);
}
