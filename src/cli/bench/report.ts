/** Results in .jsonl files, put into the page that plots them. */
import { existsSync, mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { UsageError } from "../../tensor/errors.ts";
import { packagePath } from "../package.ts";

/** A line as the page needs it: where it belongs, and whatever else it says. */
export interface ResultLine {
  readonly suite: string;
  readonly case: string;
  readonly adapter: string;
  readonly peer?: string;
  readonly [key: string]: unknown;
}

export interface Report {
  readonly path: string;
  readonly lines: number;
  readonly adapters: readonly string[];
}

/**
 * Reads JSON lines and keeps the newest of every case, suite, adapter and peer: the last one that was read.
 * @throws UsageError naming file and line for what is no result
 */
export function readLines(text: string, what: string): ResultLine[] {
  const lines: ResultLine[] = [];
  text.split("\n").forEach((line, i) => {
    if (line.trim() === "") return;
    let value: unknown = null;
    try {
      value = JSON.parse(line);
    } catch {
      // The sentence below says it.
    }
    const found = (value ?? {}) as ResultLine;
    for (const key of ["suite", "case", "adapter"] as const) {
      if (typeof found[key] !== "string") {
        throw new UsageError(`${what}, line ${i + 1}: a result must be a JSON object with "${key}", a text.`);
      }
    }
    lines.push(found);
  });
  return lines;
}

export function newest(lines: readonly ResultLine[]): ResultLine[] {
  const kept = new Map<string, ResultLine>();
  for (const line of lines) {
    const key = JSON.stringify([line.adapter, line.suite, line.case, line.peer ?? ""]);
    kept.delete(key); // so that the order is that of the newest run
    kept.set(key, line);
  }
  return [...kept.values()];
}

const DATA = /(<script type="application\/json" id="results">)[\s\S]*?(<\/script>)/;

/** The page with these results instead of those it holds. @throws Error when it has no place for them */
export function fillPage(page: string, lines: readonly ResultLine[]): string {
  if (!DATA.test(page)) throw new Error("The report's page has no element for the results.");
  // "<" may not stand in a script element's text; in JSON it occurs inside of texts alone.
  const data = lines.map((line) => JSON.stringify(line).replaceAll("<", "\\u003c")).join(",\n");
  return page.replace(DATA, (_, open: string, close: string) => `${open}[\n${data}\n]${close}`);
}

/** Writes the page with the results of all .jsonl files of a folder. */
export async function writeReport(results: string, out: string): Promise<Report> {
  if (!existsSync(results) || !statSync(results).isDirectory()) {
    throw new UsageError(`The results must be a folder with .jsonl files, found ${results}.`);
  }
  const files = readdirSync(results).filter((name) => name.endsWith(".jsonl")).sort();
  if (files.length === 0) throw new UsageError(`There are no .jsonl files in ${results}.`);
  const lines = newest(files.flatMap((name) => {
    const path = join(results, name);
    return readLines(readFileSync(path, "utf8"), path);
  }));
  const page = fillPage(readFileSync(packagePath("bench/report.html"), "utf8"), lines);
  mkdirSync(dirname(out), { recursive: true });
  writeFileSync(out, page);
  return { path: out, lines: lines.length, adapters: [...new Set(lines.map(({ adapter }) => adapter))] };
}
