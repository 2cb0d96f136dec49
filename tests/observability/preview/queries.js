// Asks Prometheus what a panel asks for, as Grafana's own data source does.
import { FieldType, rangeUtil } from '@grafana/data';

const ALL = '$__all';

export async function ask(prometheus, path, parameters) {
  const query = new URLSearchParams(parameters);
  const answer = await fetch(`${prometheus}/api/v1/${path}?${query}`);
  const { status, data, error } = await answer.json();
  if (status !== 'success') {
    throw new Error(error);
  }
  return data;
}

// Returns the values of the variables that come from label_values(series, label), as regular
// expressions, and the values that they could have.
export async function variables(prometheus, dashboard) {
  const values = {};
  const shown = [];
  for (const variable of dashboard.templating.list.filter(({ type }) => type === 'query')) {
    const [, series, label] = /^label_values\((.+), (\w+)\)$/.exec(variable.query);
    const match = interpolate(series, values);
    const found = await ask(prometheus, `label/${label}/values`, { 'match[]': match });
    const all = variable.current.value === ALL;
    values[variable.name] = all ? (variable.allValue ?? found.join('|')) : variable.current.value;
    shown.push({ name: variable.name, text: variable.current.text, found });
  }
  return { values, shown };
}

export function interpolate(expression, values) {
  return expression.replace(/\$\{?(\w+)\}?/g, (whole, name) => values[name] ?? whole);
}

// $__interval and $__rate_interval for a range that is drawn so many pixels wide.
export function intervals(range, pixels, scrapeInterval) {
  const { intervalMs } = rangeUtil.calculateInterval(range, pixels, `${scrapeInterval}s`);
  const step = Math.max(intervalMs / 1000, scrapeInterval);
  const rate = Math.max(step + scrapeInterval, 4 * scrapeInterval);
  return { step, __interval: `${step}s`, __rate_interval: `${rate}s` };
}

// One frame for each series, with the legend for its name.
export async function frames(prometheus, target, range, values, pixels, scrapeInterval) {
  const { step, ...own } = intervals(range, pixels, scrapeInterval);
  const aligned = (time) => Math.floor(time.valueOf() / 1000 / step) * step;
  const { result } = await ask(prometheus, 'query_range', {
    query: interpolate(target.expr, { ...values, ...own }),
    start: aligned(range.from),
    end: aligned(range.to),
    step,
  });
  return result.map(({ metric, values: samples }) => frame(target, metric, samples, step));
}

function frame(target, metric, samples, step) {
  const name = target.legendFormat.replace(/\{\{\s*(.+?)\s*\}\}/g, (_, label) => metric[label] ?? '');
  return {
    refId: target.refId,
    length: samples.length,
    fields: [
      {
        name: 'Time',
        type: FieldType.time,
        config: { interval: step * 1000 },
        values: samples.map(([time]) => time * 1000),
      },
      {
        name: 'Value',
        type: FieldType.number,
        labels: metric,
        config: { displayNameFromDS: name },
        // As the panel does: a value that is no number is a gap.
        values: samples.map(([, value]) => (isFinite(value) ? Number(value) : null)),
      },
    ],
  };
}
