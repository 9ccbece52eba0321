package ai.lordba.demo.app

import ai.lordba.demo.R
import ai.lordba.demo.core.Series
import ai.lordba.demo.core.overhead
import ai.lordba.demo.core.percentile
import android.content.Context
import android.content.Intent
import androidx.compose.foundation.layout.Arrangement
import androidx.compose.foundation.layout.Column
import androidx.compose.foundation.layout.fillMaxSize
import androidx.compose.foundation.layout.fillMaxWidth
import androidx.compose.foundation.layout.height
import androidx.compose.foundation.layout.padding
import androidx.compose.foundation.rememberScrollState
import androidx.compose.foundation.verticalScroll
import androidx.compose.material3.Button
import androidx.compose.material3.FilterChip
import androidx.compose.material3.LinearProgressIndicator
import androidx.compose.material3.MaterialTheme
import androidx.compose.material3.OutlinedButton
import androidx.compose.material3.Text
import androidx.compose.runtime.Composable
import androidx.compose.runtime.LaunchedEffect
import androidx.compose.runtime.getValue
import androidx.compose.ui.Modifier
import androidx.compose.ui.platform.LocalContext
import androidx.compose.ui.res.stringResource
import androidx.compose.ui.unit.dp
import androidx.core.content.FileProvider
import androidx.lifecycle.compose.collectAsStateWithLifecycle
import java.io.File

/** What an adapter costs on this phone. */
@Composable
fun LatencyScreen(
    model: LatencyViewModel,
    modifier: Modifier = Modifier,
) {
    val state by model.state.collectAsStateWithLifecycle()
    LaunchedEffect(Unit) { model.refresh() }
    Column(
        modifier = modifier.fillMaxSize().verticalScroll(rememberScrollState()).padding(16.dp),
        verticalArrangement = Arrangement.spacedBy(8.dp),
    ) {
        if (!state.isReady) OpenFirst()
        state.adapters.forEach { name ->
            FilterChip(
                selected = name in state.picked,
                onClick = { model.toggle(name) },
                label = { Text(name) },
                enabled = !state.isMeasuring,
            )
        }
        Buttons(state, model)
        if (state.isMeasuring) {
            KeepAwake()
            Text(stringResource(R.string.round_of, state.round, state.rounds))
            LinearProgressIndicator(
                progress = { state.round.toFloat() / state.rounds.coerceAtLeast(1) },
                modifier = Modifier.fillMaxWidth(),
            )
        }
        ErrorText(state.error)
        Results(state.series)
        Text(stringResource(R.string.latency_note), style = MaterialTheme.typography.bodySmall)
    }
}

@Composable
private fun Buttons(
    state: LatencyScreenState,
    model: LatencyViewModel,
) {
    val context = LocalContext.current
    ButtonRow {
        Button(onClick = model::measure, enabled = state.isReady && !state.isMeasuring) {
            Text(stringResource(R.string.measure))
        }
        OutlinedButton(onClick = model::stop, enabled = state.isMeasuring) { Text(stringResource(R.string.stop)) }
        state.file?.let { file ->
            OutlinedButton(onClick = { share(context, file) }) { Text(stringResource(R.string.share)) }
        }
    }
}

@Composable
private fun Results(all: List<Series>) {
    for ((phase, series) in all.groupBy { it.phase }) {
        val tokens = series.first().tokens
        Text(if (tokens > 1) "$phase, $tokens tokens" else phase, style = MaterialTheme.typography.titleMedium)
        LatencyBars(series, Modifier.fillMaxWidth().height((28 * series.size).dp))
        val base = series.find { it.adapter == "none" }
        series.forEach { Line(it, base) }
    }
}

@Composable
private fun Line(
    series: Series,
    base: Series?,
) {
    val name = series.adapterName ?: stringResource(R.string.no_adapter)
    val (p50, p99) = percentile(series.samples, 50.0) to percentile(series.samples, 99.0)
    Text(stringResource(R.string.latency_row, name, numberText(p50, 2), numberText(p99, 2)))
    if (base == null || base === series) return
    val over = overhead(series.samples, base.samples)
    val percent = over.percent
    Text(
        if (percent == null) {
            stringResource(R.string.below_noise, numberText(over.noisePercent))
        } else {
            stringResource(R.string.overhead, numberText(percent))
        },
        style = MaterialTheme.typography.bodySmall,
    )
}

/** Hands the file to an app that the user picks, which may read this one file. */
private fun share(
    context: Context,
    file: File,
) {
    val uri = FileProvider.getUriForFile(context, "${context.packageName}.files", file)
    val send = Intent(Intent.ACTION_SEND).setType("application/json").putExtra(Intent.EXTRA_STREAM, uri)
    send.addFlags(Intent.FLAG_GRANT_READ_URI_PERMISSION)
    context.startActivity(Intent.createChooser(send, file.name))
}
