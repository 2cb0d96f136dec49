// Draws the dashboard with Grafana's published components. The address says where Prometheus is:
// ?prometheus=http://localhost:9090&scrape=15&from=...&to=... (milliseconds; default: the last hour)
import {
  applyFieldOverrides,
  createTheme,
  dateTime,
  EventBusSrv,
  FieldColorModeId,
  ThemeContext,
  ThresholdsMode,
} from '@grafana/data';
import {
  AxisPlacement,
  GraphDrawStyle,
  LegendDisplayMode,
  LineInterpolation,
  StackingMode,
  VisibilityMode,
} from '@grafana/schema';
import {
  GlobalStyles,
  PanelChrome,
  PanelContextProvider,
  TimeSeries,
} from '@grafana/ui';
import '@fontsource/inter/400.css';
import '@fontsource/inter/500.css';
import { useEffect, useState } from 'react';
import { createRoot } from 'react-dom/client';
import { frames, variables } from './queries.js';

const address = new URLSearchParams(location.search);
const PROMETHEUS = address.get('prometheus') ?? 'http://localhost:9090';
const HOUR = 3600_000;
const SCRAPE = Number(address.get('scrape') ?? 15);

// What Grafana has for a grid of 24 columns.
const CELL_HEIGHT = 30;
const GAP = 8;
const MARGIN = 16;

// What the panel has where the dashboard does not say.
const GRAPH = {
  drawStyle: GraphDrawStyle.Line,
  lineInterpolation: LineInterpolation.Linear,
  lineWidth: 1,
  fillOpacity: 0,
  showPoints: VisibilityMode.Auto,
  pointSize: 5,
  spanNulls: false,
  axisPlacement: AxisPlacement.Auto,
  stacking: { mode: StackingMode.None, group: 'A' },
};
const DEFAULTS = {
  color: { mode: FieldColorModeId.PaletteClassic },
  thresholds: {
    mode: ThresholdsMode.Absolute,
    steps: [
      { value: -Infinity, color: 'green' },
      { value: 80, color: 'red' },
    ],
  },
};
const LEGEND = {
  displayMode: LegendDisplayMode.List,
  placement: 'bottom',
  showLegend: true,
  calcs: [],
};

const theme = createTheme({ colors: { mode: 'dark' } });

const RANGE = (() => {
  const to = dateTime(Number(address.get('to')) || Date.now());
  const from = dateTime(Number(address.get('from')) || to.valueOf() - HOUR);
  return { from, to, raw: { from, to } };
})();

// Grafana copies what is in `custom` by its registry of options; here it is done by hand. Nothing
// is overridden in the dashboard.
function applied({ fieldConfig: { defaults } }, data) {
  const config = { ...DEFAULTS, ...defaults, custom: { ...GRAPH, ...defaults.custom } };
  const fieldsOf = ({ fields: [time, value] }) => [
    { ...time, config: { ...time.config, custom: {} } },
    { ...value, config: { ...config, ...value.config } },
  ];
  return applyFieldOverrides({
    data: data.map((frame) => ({ ...frame, fields: fieldsOf(frame) })),
    fieldConfig: { defaults: {}, overrides: [] },
    replaceVariables: (text) => text,
    theme,
    timeZone: 'utc',
  });
}

function Content({ panel, data, width, height }) {
  if (panel.type !== 'timeseries') {
    throw new Error(`${panel.title}: a ${panel.type} is not drawn here yet`);
  }
  return (
    <TimeSeries
      frames={data}
      width={width}
      height={height}
      timeRange={RANGE}
      timeZone="utc"
      legend={{ ...LEGEND, ...panel.options.legend }}
      options={panel.options}
    />
  );
}

function Panel({ panel, values, width, height, told }) {
  const [data, setData] = useState(null);
  useEffect(() => {
    const load = async () => {
      const asked = panel.targets.map((target) =>
        frames(PROMETHEUS, target, RANGE, values, Math.floor(width), SCRAPE)
      );
      const found = (await Promise.all(asked)).flat();
      const drawn = found.filter(({ fields: [, { values: numbers }] }) => numbers.some(isNumber));
      told(panel, drawn.length);
      setData(applied(panel, found));
    };
    load().catch((error) => told(panel, String(error)));
  }, []);
  return (
    <PanelChrome title={panel.title} description={panel.description} width={width} height={height}>
      {(innerWidth, innerHeight) =>
        data?.length ? (
          <Content panel={panel} data={data} width={innerWidth} height={innerHeight} />
        ) : (
          <div className="panel-empty">{data ? 'No data' : ''}</div>
        )
      }
    </PanelChrome>
  );
}

function isNumber(value) {
  return value !== null;
}

function place({ x, y, w, h }, width) {
  const column = (width + GAP) / 24;
  return {
    left: x * column,
    top: y * (CELL_HEIGHT + GAP),
    width: w * column - GAP,
    height: h * (CELL_HEIGHT + GAP) - GAP,
  };
}

function Dashboard({ dashboard, known }) {
  const width = document.documentElement.clientWidth - 2 * MARGIN;
  const [counts, setCounts] = useState({});
  const told = (panel, count) => setCounts((before) => ({ ...before, [panel.id]: count }));
  const drawn = dashboard.panels.filter(({ type }) => type !== 'row');
  const done = Object.keys(counts).length === drawn.length;
  const bottom = Math.max(...dashboard.panels.map(({ gridPos: { y, h } }) => y + h));
  return (
    <div style={{ margin: MARGIN }}>
      <h4>{dashboard.title}</h4>
      <p>
        {known.shown.map(({ name, text, found }) => (
          <span key={name} style={{ marginRight: 24 }}>
            {name}: <b>{text}</b> ({found.join(', ')})
          </span>
        ))}
      </p>
      <div style={{ position: 'relative', height: bottom * (CELL_HEIGHT + GAP) }}>
        {dashboard.panels.map((panel) => {
          const where = place(panel.gridPos, width);
          return (
            <div key={panel.id} style={{ position: 'absolute', ...where }}>
              {panel.type === 'row' ? (
                <h5 style={{ margin: '6px 0' }}>⌄ {panel.title}</h5>
              ) : (
                <Panel panel={panel} values={known.values} told={told} {...where} />
              )}
            </div>
          );
        })}
      </div>
      <pre id="counts" hidden>
        {done ? JSON.stringify(counts) : ''}
      </pre>
    </div>
  );
}

const bus = new EventBusSrv();
const context = { eventsScope: 'global', eventBus: bus, onToggleSeriesVisibility: () => {} };

async function begin() {
  // Axes are as wide as their labels are in this font.
  await Promise.all(['400', '500'].map((weight) => document.fonts.load(`${weight} 12px Inter`)));
  const dashboard = await (await fetch('dashboard.json')).json();
  const known = await variables(PROMETHEUS, dashboard);
  createRoot(document.getElementById('page')).render(
    <ThemeContext.Provider value={theme}>
      <GlobalStyles />
      <PanelContextProvider value={context}>
        <Dashboard dashboard={dashboard} known={known} />
      </PanelContextProvider>
    </ThemeContext.Provider>
  );
}

begin();
