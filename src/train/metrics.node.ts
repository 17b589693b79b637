/** `metrics.jsonl` on disk. */
import {
  closeSync, existsSync, fsyncSync, mkdirSync, openSync, readFileSync, renameSync, writeFileSync,
} from "node:fs";
import { dirname } from "node:path";
import { UsageError } from "../tensor/errors.ts";
import { type MetricRecord, formatMetric, parseMetrics } from "./metrics.ts";

/** Reads a metrics file. */
export function readMetrics(path: string): MetricRecord[] {
  if (!existsSync(path)) throw new UsageError(`The metrics file ${path} does not exist.`);
  return parseMetrics(readFileSync(path, "utf8"), path);
}

/**
 * Appends records to a metrics file. Every line reaches the operating system before `write` returns, so a
 * crash of the process loses nothing; `flush` makes the lines survive a crash of the machine.
 */
export class MetricsWriter {
  readonly path: string;
  #file: number;
  #lastStep: number;

  /**
   * Opens the file, and its folder, for a new run (what was there is replaced), or to continue after step
   * `resumeStep`: then the records beyond it, and a half-written last line, are taken out first.
   */
  constructor(path: string, resumeStep?: number) {
    this.path = path;
    mkdirSync(dirname(path), { recursive: true });
    const kept = resumeStep === undefined || !existsSync(path)
      ? []
      : readMetrics(path).filter(({ step }) => step <= resumeStep);
    this.#lastStep = kept.at(-1)?.step ?? 0;
    // Written beside the file and renamed: an interruption leaves the old record or the new one.
    const temporary = `${path}.tmp`;
    const file = openSync(temporary, "w");
    writeFileSync(file, kept.map(formatMetric).join(""));
    fsyncSync(file);
    closeSync(file);
    renameSync(temporary, path);
    this.#file = openSync(path, "a");
  }

  /** @throws UsageError  when the record's step is not a whole number or lies before the last one */
  write(record: MetricRecord): void {
    if (!Number.isSafeInteger(record.step) || record.step < this.#lastStep) {
      throw new UsageError(
        `A metric's step must be a whole number of at least ${this.#lastStep}, found ${record.step}.`,
      );
    }
    writeFileSync(this.#file, formatMetric(record));
    this.#lastStep = record.step;
  }

  flush(): void {
    fsyncSync(this.#file);
  }

  close(): void {
    if (this.#file < 0) return;
    this.flush();
    closeSync(this.#file);
    this.#file = -1;
  }
}
