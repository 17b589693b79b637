/** Text for people: numbers with units, aligned tables, colours. */

/** The part of a terminal stream that the command line uses. */
export interface TextStream {
  write(text: string): unknown;
  readonly isTTY?: boolean | undefined;
  readonly columns?: number | undefined;
}

export type Environment = Readonly<Record<string, string | undefined>>;

/** 0 B, 1023 B, 1.5 KiB, 12.0 MiB, ... */
export function formatBytes(bytes: number): string {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let value = bytes;
  let unit = 0;
  while (Math.abs(value) >= 1023.95 && unit < units.length - 1) {
    value /= 1024;
    unit++;
  }
  return `${unit === 0 ? String(Math.round(value)) : value.toFixed(1)} ${units[unit]!}`;
}

/** 950, 1.2k, 34.6k, 1.25M, 30.0B: three significant digits from a thousand on. */
export function formatCount(count: number): string {
  for (const [size, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]] as const) {
    // 999.6k would round to 1000k.
    if (Math.abs(count) >= size * 0.9995) {
      const value = count / size;
      return `${value.toFixed(Math.abs(value) >= 99.95 ? 0 : Math.abs(value) >= 9.995 ? 1 : 2)}${unit}`;
    }
  }
  return Number.isInteger(count) ? String(count) : Number(count.toPrecision(3)).toString();
}

/**
 * 0.25 s, 12.3 s, 4 min 05 s, 2 h 07 min, 3 d 4 h; whole seconds without decimals: 8 s. Unknown lengths are
 * "?".
 */
export function formatDuration(seconds: number): string {
  if (!Number.isFinite(seconds) || seconds < 0) return "?";
  if (seconds < 60 && Number.isInteger(seconds)) return `${seconds} s`;
  if (seconds < 9.995) return `${seconds.toFixed(2)} s`;
  if (seconds < 59.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  const two = (value: number): string => String(value).padStart(2, "0");
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${two(whole % 60)} s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${two(Math.floor((whole % 3600) / 60))} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}

const CODES = {
  bold: [1, 22], dim: [2, 22],
  red: [31, 39], green: [32, 39], yellow: [33, 39], blue: [34, 39], cyan: [36, 39],
} as const;

export type Colours = Readonly<Record<keyof typeof CODES, (text: string) => string>>;

/** Functions that colour a text, or give it back as it is. */
export function colours(enabled: boolean): Colours {
  const paint = (name: keyof typeof CODES) => (text: string): string => {
    return enabled && text !== "" ? `\x1b[${CODES[name][0]}m${text}\x1b[${CODES[name][1]}m` : text;
  };
  return {
    bold: paint("bold"), dim: paint("dim"), red: paint("red"), green: paint("green"), yellow: paint("yellow"),
    blue: paint("blue"), cyan: paint("cyan"),
  };
}

/**
 * Whether a stream shows colours: a terminal, and neither NO_COLOR (any text) nor TERM=dumb; FORCE_COLOR
 * overrules the stream.
 */
export function wantsColour(stream: TextStream, env: Environment): boolean {
  if (env["NO_COLOR"]) return false;
  if (env["FORCE_COLOR"] && env["FORCE_COLOR"] !== "0") return true;
  return isLive(stream, env);
}

/** Whether a line can be drawn over: a terminal that understands escape codes. */
export function isLive(stream: TextStream, env: Environment): boolean {
  return stream.isTTY === true && env["TERM"] !== "dumb";
}

const ESCAPES = new RegExp(`${String.fromCharCode(27)}\\[[0-9;?]*[A-Za-z]`, "g");

/** Number of columns that a text takes, escape codes left out. Every code point counts as one column. */
export function visibleWidth(text: string): number {
  return [...text.replace(ESCAPES, "")].length;
}

/** Shortens a text without escape codes to `width` columns, with "…" at the end when something is cut. */
export function truncate(text: string, width: number): string {
  const characters = [...text];
  if (characters.length <= width) return text;
  return width <= 0 ? "" : `${characters.slice(0, width - 1).join("")}…`;
}

export interface TableOptions {
  /** Per column; the last one is repeated. Default: all left. */
  readonly align?: readonly ("left" | "right")[];
  /** Put before every line. */
  readonly indent?: string;
  /** Columns between two cells. Default 2. */
  readonly gap?: number;
}

/** Aligns rows of cells to columns: one line per row, without trailing spaces. Cells may hold colours. */
export function table(rows: readonly (readonly string[])[], options: TableOptions = {}): string {
  const { align = ["left"], indent = "", gap = 2 } = options;
  const widths: number[] = [];
  for (const row of rows) {
    row.forEach((cell, column) => (widths[column] = Math.max(widths[column] ?? 0, visibleWidth(cell))));
  }
  return rows.map((row) => {
    const cells = row.map((cell, column) => {
      const room = " ".repeat(widths[column]! - visibleWidth(cell));
      return (align[column] ?? align.at(-1)) === "right" ? room + cell : cell + room;
    });
    return `${indent}${cells.join(" ".repeat(gap))}`.trimEnd();
  }).join("\n");
}

/** Breaks a text into lines of at most `width` columns at spaces; longer words stay whole. */
export function wrap(text: string, width: number): string[] {
  const lines: string[] = [];
  let line = "";
  for (const word of text.split(/\s+/)) {
    if (line !== "" && visibleWidth(line) + 1 + visibleWidth(word) > width) {
      lines.push(line);
      line = word;
    } else {
      line = line === "" ? word : `${line} ${word}`;
    }
  }
  return line === "" ? lines : [...lines, line];
}
