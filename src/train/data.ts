/**
 * Documents and how they are divided into training and validation text. Nothing here touches files, so a page
 * can use it on pasted text; `data.node.ts` reads files and folders.
 */
import { FormatError, UsageError } from "../tensor/errors.ts";
import { hashText } from "./random.ts";

/** A text that stands alone: no context crosses from one document to the next. */
export interface Document {
  /** Where it came from: the given path's last part and what follows (`corpus/a.txt`, `lines.jsonl:17`). */
  readonly name: string;
  readonly text: string;
}

export interface SplitOptions {
  /** Decides which documents validate. Integer, 0 <= seed < 2^53. Default 0. */
  readonly seed?: number;
  /** Share of the characters that validation should reach, in (0, 0.5]. Default 0.075. */
  readonly fraction?: number;
}

export interface DataSplit {
  readonly train: readonly Document[];
  readonly validation: readonly Document[];
}

/** How far validation may exceed its share before a document is passed over for a smaller one. */
const OVERSHOOT = 4 / 3;
/** The end of a lone document that validates. */
const TAIL_FRACTION = 0.1;

/**
 * Divides documents into training and validation sets, the same way for the same names, texts and seed.
 *
 * Documents are taken for validation in the order of a hash of (seed, name) until they hold `fraction` of the
 * characters; one that would take validation beyond 4/3 of that is passed over, so a corpus of unequal files
 * keeps its share (with the default: 7.5 to 10 %). Documents with the very same text stay on one side, so
 * that nothing validates on text that was trained on. Both sides get at least one document. A single text is
 * cut instead: its last 10 % validate, from the start of a line where one is near.
 *
 * @throws FormatError  when there is no text, or too little of it to divide
 * @throws UsageError   when `fraction` is outside (0, 0.5]
 */
export function splitDocuments(documents: readonly Document[], options: SplitOptions = {}): DataSplit {
  const { seed = 0, fraction = 0.075 } = options;
  if (!(fraction > 0 && fraction <= 0.5)) {
    throw new UsageError(`The validation fraction must be above 0 and at most 0.5, found ${fraction}.`);
  }
  const groups = groupByText(documents);
  if (groups.length === 0) throw new FormatError("The training data holds no text: every document is empty.");
  if (groups.length === 1) return splitByPosition(groups[0]![0]!);

  const total = groups.reduce((sum, group) => sum + characters(group), 0);
  const ranked = groups
    .map((group) => ({ group, rank: hashText(group[0]!.name, seed), size: characters(group) }))
    .sort((p, q) => p.rank - q.rank || compareNames(p.group[0]!.name, q.group[0]!.name));
  const chosen = new Set<Document>();
  let taken = 0;
  for (const { group, size } of ranked) {
    if (taken >= fraction * total) break;
    if (taken + size > fraction * total * OVERSHOOT) continue;
    for (const document of group) chosen.add(document);
    taken += size;
  }
  if (chosen.size === 0) {
    const smallest = ranked.reduce((best, entry) => (entry.size < best.size ? entry : best));
    for (const document of smallest.group) chosen.add(document);
  }
  const filled = groups.flat();
  const order = new Map(documents.map((document, index) => [document, index]));
  filled.sort((p, q) => order.get(p)! - order.get(q)!);
  return { train: filled.filter((d) => !chosen.has(d)), validation: filled.filter((d) => chosen.has(d)) };
}

/**
 * Reads JSON lines: one object with a string `text` per line. Blank lines and empty texts are passed over.
 *
 * @throws FormatError  naming the file and the line
 */
export function* parseJsonLines(content: string, name: string): Generator<Document> {
  let number = 0;
  for (const line of lines(content)) {
    number++;
    if (line.trim() === "") continue;
    let value: unknown;
    try {
      value = JSON.parse(line);
    } catch {
      throw new FormatError(`${name} line ${number}: expected a JSON object, found ${excerpt(line)}.`);
    }
    const text = typeof value === "object" && value !== null && "text" in value ? value.text : undefined;
    if (typeof text !== "string") {
      const found = typeof value !== "object" || value === null || Array.isArray(value)
        ? excerpt(line)
        : text === undefined ? `the fields ${Object.keys(value).slice(0, 8).join(", ") || "(none)"}`
          : `a "text" that is not a string`;
      const where = `${name} line ${number}`;
      throw new FormatError(`${where}: expected an object with a string "text", found ${found}.`);
    }
    if (text !== "") yield { name: `${name}:${number}`, text };
  }
}

/** Orders names by UTF-16 code units, the same on every machine and in every locale. */
export function compareNames(a: string, b: string): number {
  return a < b ? -1 : a > b ? 1 : 0;
}

function splitByPosition({ name, text }: Document): DataSplit {
  const target = Math.floor(text.length * (1 - TAIL_FRACTION));
  const line = text.lastIndexOf("\n", target - 1) + 1;
  // A line start is the better cut unless it would more than double the tail.
  let cut = line > text.length * (1 - 2 * TAIL_FRACTION) ? line : target;
  if (cut > 0 && isLowSurrogate(text.charCodeAt(cut))) cut--;
  if (cut <= 0 || cut >= text.length) {
    throw new FormatError(
      `${name} holds ${text.length} characters, too few to keep a part of it for validation.`,
    );
  }
  return {
    train: [{ name, text: text.slice(0, cut) }],
    validation: [{ name: `${name}#end`, text: text.slice(cut) }],
  };
}

function groupByText(documents: readonly Document[]): Document[][] {
  const groups = new Map<string, Document[]>();
  for (const document of documents) {
    if (document.text === "") continue;
    const group = groups.get(document.text);
    if (group) group.push(document);
    else groups.set(document.text, [document]);
  }
  for (const group of groups.values()) group.sort((p, q) => compareNames(p.name, q.name));
  return [...groups.values()];
}

function characters(group: readonly Document[]): number {
  return group.reduce((sum, document) => sum + document.text.length, 0);
}

function* lines(content: string): Generator<string> {
  for (let start = 0; start <= content.length;) {
    const end = content.indexOf("\n", start);
    yield content.slice(start, end < 0 ? content.length : end);
    if (end < 0) return;
    start = end + 1;
  }
}

function excerpt(line: string): string {
  const text = line.trim();
  return JSON.stringify(text.length > 40 ? `${text.slice(0, 40)}…` : text);
}

function isLowSurrogate(unit: number): boolean {
  return unit >= 0xdc00 && unit <= 0xdfff;
}
