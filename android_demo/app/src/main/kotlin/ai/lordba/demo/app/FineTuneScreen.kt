package ai.lordba.demo.app

import ai.lordba.demo.R
import ai.lordba.demo.core.FineTuneState
import androidx.compose.foundation.layout.Arrangement
import androidx.compose.foundation.layout.Column
import androidx.compose.foundation.layout.fillMaxSize
import androidx.compose.foundation.layout.fillMaxWidth
import androidx.compose.foundation.layout.height
import androidx.compose.foundation.layout.imePadding
import androidx.compose.foundation.layout.padding
import androidx.compose.foundation.rememberScrollState
import androidx.compose.foundation.verticalScroll
import androidx.compose.material3.Button
import androidx.compose.material3.LinearProgressIndicator
import androidx.compose.material3.OutlinedButton
import androidx.compose.material3.OutlinedTextField
import androidx.compose.material3.Slider
import androidx.compose.material3.Text
import androidx.compose.runtime.Composable
import androidx.compose.runtime.getValue
import androidx.compose.ui.Modifier
import androidx.compose.ui.res.stringResource
import androidx.compose.ui.unit.dp
import androidx.lifecycle.compose.collectAsStateWithLifecycle

/** Text becomes an adapter on the phone itself. */
@Composable
fun FineTuneScreen(
    model: FineTuneViewModel,
    modifier: Modifier = Modifier,
) {
    val state by model.state.collectAsStateWithLifecycle()
    Column(
        modifier =
            modifier
                .fillMaxSize()
                .imePadding()
                .verticalScroll(rememberScrollState())
                .padding(16.dp),
        verticalArrangement = Arrangement.spacedBy(8.dp),
    ) {
        if (!state.isReady) OpenFirst()
        ErrorText(state.whyNot)
        Form(state, model::edit)
        Buttons(state, model)
        Outcome(state.run)
    }
}

@Composable
private fun Form(
    state: FineTuneScreenState,
    onEdit: (FineTuneForm) -> Unit,
) {
    val form = state.form
    val enabled = !state.run.isBusy
    OutlinedTextField(
        value = form.text,
        onValueChange = { onEdit(form.copy(text = it)) },
        label = { Text(stringResource(R.string.text_to_learn)) },
        enabled = enabled,
        minLines = 4,
        maxLines = 10,
        modifier = Modifier.fillMaxWidth(),
    )
    OutlinedTextField(
        value = form.name,
        onValueChange = { onEdit(form.copy(name = it)) },
        label = { Text(stringResource(R.string.adapter_name)) },
        enabled = enabled,
        singleLine = true,
        modifier = Modifier.fillMaxWidth(),
    )
    Text(stringResource(R.string.start_from))
    AdapterChips(state.adapters, form.start, stringResource(R.string.from_nothing), enabled) {
        onEdit(form.copy(start = it))
    }
    Text("${stringResource(R.string.steps)}: ${form.steps}")
    Slider(
        value = form.steps.toFloat(),
        onValueChange = { onEdit(form.copy(steps = it.toInt())) },
        valueRange = 5f..200f,
        enabled = enabled,
    )
}

@Composable
private fun Buttons(
    state: FineTuneScreenState,
    model: FineTuneViewModel,
) {
    val trains = state.run is FineTuneState.Running || state.run is FineTuneState.Preparing
    val canStart = state.isReady && state.whyNot == null && !state.run.isBusy
    ButtonRow {
        Button(onClick = model::train, enabled = canStart && state.form.text.isNotBlank()) {
            Text(stringResource(R.string.train))
        }
        OutlinedButton(onClick = model::pause, enabled = trains) { Text(stringResource(R.string.pause)) }
        OutlinedButton(onClick = model::cancel, enabled = trains) { Text(stringResource(R.string.cancel)) }
    }
    state.pending?.takeIf { !state.run.isBusy }?.let { pending ->
        OutlinedButton(onClick = model::resume, enabled = canStart) {
            Text(stringResource(R.string.resume_run, pending.adapter))
        }
    }
}

@Composable
private fun Outcome(run: FineTuneState) {
    if (run.isBusy) KeepAwake()
    when (run) {
        is FineTuneState.Idle -> Unit
        is FineTuneState.Preparing -> Waiting(stringResource(R.string.preparing))
        is FineTuneState.Running -> Steps(run)
        is FineTuneState.Saving -> Waiting(stringResource(R.string.saving))
        is FineTuneState.Saved -> Text(stringResource(R.string.saved, run.adapter))
        is FineTuneState.Cancelled -> Text(stringResource(R.string.cancelled))
        is FineTuneState.Paused -> Text(stringResource(R.string.paused, run.losses.size))
        is FineTuneState.Failed -> ErrorText(run.message)
    }
    if (run.losses.isNotEmpty()) {
        Text(stringResource(R.string.loss))
        LossCurve(run.losses, Modifier.fillMaxWidth().height(180.dp))
    }
}

@Composable
private fun Steps(run: FineTuneState.Running) {
    val loss = numberText(run.losses.last().toDouble(), 3)
    Text(stringResource(R.string.step_of, run.losses.size, run.steps, loss))
    LinearProgressIndicator(
        progress = { run.losses.size.toFloat() / run.steps },
        modifier = Modifier.fillMaxWidth(),
    )
}

@Composable
private fun Waiting(what: String) {
    Text(what)
    LinearProgressIndicator(modifier = Modifier.fillMaxWidth())
}
